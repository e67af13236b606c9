//! The steps of single transactions, as the server logs tell them.

use anyhow::{Context, Result, ensure};
use multimaster_tests::{Rig, SharedCase, cases};
use xtask::cluster::wait_for;
use xtask::trace;

use crate::held::arm;
use crate::in_flight::STATE_LIMIT;

pub fn cases() -> Vec<SharedCase> {
    cases![
        steps_of_a_transaction_can_be_logged,
        vote_that_overtakes_its_backend_asks_no_log,
    ]
}

fn steps_of_a_transaction_can_be_logged(rig: &Rig) -> Result<()> {
    rig.session(1)?.run("CREATE TABLE t (id serial)")?;
    set_log_level(rig, "debug1")?;
    let steps = wait_for_steps(rig);
    set_log_level(rig, "DEFAULT")?;
    let steps = steps?;
    let place = |node: &str, text: &str| {
        steps
            .iter()
            .position(|step| step.node == node && step.text.starts_with(text))
            .with_context(|| format!("no {text:?} of {node} in {steps:#?}"))
    };
    // What depends on each other. Whether node 2 or node 3 is the faster one is left open.
    let precommit = [
        place("n1", "PREPARE is durable")?,
        place("n1", "Propose Precommit, ballot 1.0 to n2")?,
        place("n2", "Propose Precommit, ballot 1.0 from n1")?,
        place("n2", "Accepted, ballot 1.0 to n1")?,
    ];
    let outcome = [
        place("n1", "Accepted, ballot 1.0 from")?,
        place("n1", "Decided Commit")?,
        place("n2", "Decided Commit")?,
        place("n2", "Finished Commit to n1")?,
        place("n1", "Forget to n2")?,
        place("n2", "record to be emptied")?,
    ];
    ensure!(
        precommit.is_sorted() && outcome.is_sorted(),
        "out of order: {steps:#?}"
    );
    Ok(())
}

/// All steps of a transaction. The arbiters take to the new level when they come to it, so several are tried.
fn wait_for_steps(rig: &Rig) -> Result<Vec<trace::Step>> {
    let mut session = rig.session(1)?;
    let mut gids = Vec::new();
    let mut whole = Vec::new();
    wait_for("a transaction with all its steps", STATE_LIMIT, || {
        session.run(
            "BEGIN; SET LOCAL multimaster.commit_mode = 'e3pc'; INSERT INTO t DEFAULT VALUES",
        )?;
        gids.push(session.text("SELECT mtm.current_gid()")?);
        session.run("COMMIT")?;
        for gid in &gids {
            let steps = trace::steps(&rig.cluster, gid);
            let begun = steps
                .iter()
                .any(|step| step.text.starts_with("PREPARE is durable"));
            let ended = |step: &&trace::Step| step.text == "record to be emptied";
            if begun && steps.iter().filter(ended).count() == rig.len() {
                whole = steps;
                return Ok(true);
            }
        }
        Ok(false)
    })?;
    Ok(whole)
}

fn set_log_level(rig: &Rig, level: &str) -> Result<()> {
    for node in 1..=rig.len() {
        let mut session = rig.session(node)?;
        session.run(&format!("ALTER SYSTEM SET log_min_messages = {level}"))?;
        session.run("SELECT pg_reload_conf()")?;
    }
    Ok(())
}

/// The peers can vote before the backend has told that its PREPARE is done. Then the vote waits for the backend, and nobody asks how the transaction ended.
fn vote_that_overtakes_its_backend_asks_no_log(rig: &Rig) -> Result<()> {
    rig.session(1)?.run("CREATE TABLE t (id serial)")?;
    set_log_level(rig, "debug1")?;
    arm(rig, 1, "backend-after-prepare=sleep:100")?;
    let found = wait_for("a vote that waited for its backend", STATE_LIMIT, || {
        let mut session = rig.session(1)?;
        session.run("BEGIN; INSERT INTO t DEFAULT VALUES")?;
        let gid = session.text("SELECT mtm.current_gid()")?;
        session.run("COMMIT")?;
        Ok(vote_waited(&trace::steps(&rig.cluster, &gid)))
    });
    arm(rig, 1, "")?;
    set_log_level(rig, "DEFAULT")?;
    found
}

/// Whether a vote came first, and the log was not asked.
fn vote_waited(steps: &[trace::Step]) -> bool {
    let place = |text: &str| {
        let is_it = |step: &trace::Step| step.node == "n1" && step.text.starts_with(text);
        steps.iter().position(is_it)
    };
    let overtaken = match (place("Vote yes from"), place("PREPARE is durable")) {
        (Some(vote), Some(prepare)) => vote < prepare,
        _ => false,
    };
    overtaken && place("its fate is looked up").is_none()
}
