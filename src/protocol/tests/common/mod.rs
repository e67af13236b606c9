//! A core with its effects at hand.
#![allow(dead_code, reason = "each test file uses its own part")]

use protocol::{
    Ballot, Config, Core, Effect, Effects, Event, GenerationNum, Gid, Input, Lsn, Message, Millis,
    NodeId, NodeSet, Recovered, Vote,
};

pub fn n(id: u8) -> NodeId {
    NodeId::new(id).expect("tests name nodes that can exist")
}

pub fn gid(coordinator: u8, xid: u64) -> Gid {
    Gid {
        coordinator: n(coordinator),
        xid,
        generation: GenerationNum(1),
        started_at: xid as i64,
    }
}

pub fn resolver_ballot(term: u32, node: u8) -> Ballot {
    Ballot {
        term,
        node: Some(n(node)),
    }
}

/// One of three nodes, with links to the others.
pub struct Bench {
    pub core: Core,
    pub now: Millis,
}

impl Bench {
    pub fn new(node: u8) -> Self {
        Self::recovered(node, Vec::new()).0
    }

    /// A node whose server goes on, with a core that knows nothing of what the last one did.
    pub fn successor(node: u8, first_xid: u64) -> Self {
        Self::restarted(node, first_xid, Vec::new()).0
    }

    /// The same with something found.
    pub fn restarted(node: u8, first_xid: u64, found: Vec<Recovered>) -> (Self, Vec<Effect>) {
        let mut out = Effects::new();
        let nodes: NodeSet = (1..=3).map(n).collect();
        let config = Config {
            first_xid,
            ..Config::new(n(node), nodes, 2)
        };
        let mut bench = Self {
            core: Core::new(config, found, 0, &mut out),
            now: 0,
        };
        let effects = out.drain().filter(|effect| !is_noise(effect)).collect();
        for peer in nodes.without(n(node)).iter() {
            bench.give(Input::LinkUp { peer, epoch: 1 });
        }
        (bench, effects)
    }

    /// A node that finds something at its start, and what it does about it. It has no links yet.
    pub fn recovered(node: u8, found: Vec<Recovered>) -> (Self, Vec<Effect>) {
        let mut out = Effects::new();
        let restarted = !found.is_empty();
        let nodes: NodeSet = (1..=3).map(n).collect();
        let core = Core::new(Config::new(n(node), nodes, 1), found, 0, &mut out);
        let mut bench = Self { core, now: 0 };
        if !restarted {
            for peer in nodes.without(n(node)).iter() {
                bench.give(Input::LinkUp { peer, epoch: 1 });
            }
        }
        (bench, out.drain().collect())
    }

    /// What the core does about an input, without what is only for logs and the causal order.
    pub fn give(&mut self, input: Input) -> Vec<Effect> {
        let mut out = Effects::new();
        self.core.handle(self.now, input, &mut out);
        out.drain().filter(|effect| !is_noise(effect)).collect()
    }

    pub fn hear(&mut self, from: u8, msg: Message) -> Vec<Effect> {
        self.give(Input::Message { from: n(from), msg })
    }

    pub fn vote(&mut self, gid: Gid, vote: Vote, lsn: u64) -> Vec<Effect> {
        self.give(Input::Voted {
            gid,
            vote,
            prepare_lsn: Lsn(lsn),
        })
    }

    pub fn later(&mut self, pause: Millis) -> Vec<Effect> {
        self.now += pause;
        self.give(Input::Tick)
    }
}

/// What is only for logs and the causal order.
fn is_noise(effect: &Effect) -> bool {
    match effect {
        Effect::Event(event) => !matches!(event, Event::Rejected { .. }),
        Effect::Send { msg, .. } => {
            matches!(msg, Message::AskHorizon | Message::Horizon { .. })
        }
        Effect::Settled { .. } | Effect::Visible { .. } => true,
        _ => false,
    }
}

/// The effects as short words: who is told what, in order.
pub fn words(effects: &[Effect]) -> Vec<String> {
    effects.iter().map(word).collect()
}

fn word(effect: &Effect) -> String {
    match effect {
        Effect::Send { to, msg } => format!("{to} <- {}", saying(msg)),
        Effect::Persist { record, .. } => format!("persist {}", state(record)),
        Effect::Write { record, .. } => format!("write {}", state(record)),
        Effect::Free { .. } => "free".into(),
        Effect::Finish { decision, .. } => format!("finish {decision:?}"),
        Effect::Reply { outcome, .. } => match outcome {
            protocol::Outcome::Commit { csn } => format!("reply commit {csn}"),
            protocol::Outcome::Abort(refusal) => format!("reply abort: {}", refusal.message()),
            protocol::Outcome::Unknown => "reply unknown".into(),
        },
        Effect::PeersFinished { .. } => "peers finished".into(),
        Effect::LookUp { .. } => "look up".into(),
        other => format!("{other:?}"),
    }
}

fn saying(msg: &Message) -> String {
    match msg {
        Message::Vote {
            vote: Vote::Yes, ..
        } => "yes".into(),
        Message::Vote {
            vote: Vote::No(_), ..
        } => "no".into(),
        Message::Propose {
            ballot, verdict, ..
        } => format!("{verdict:?} {ballot}"),
        Message::Accepted { ballot, .. } => format!("accepted {ballot}"),
        Message::Refused { promised, .. } => format!("refused, promised {promised}"),
        Message::Status { ballot, .. } => format!("status {ballot}"),
        Message::Promised {
            ballot,
            accepted,
            voted_yes,
            ..
        } => {
            let accepted = accepted.map_or("nothing".into(), |accepted| {
                format!("{:?}", accepted.verdict)
            });
            let vote = if *voted_yes { "yes" } else { "no vote" };
            format!("promised {ballot}, {accepted}, {vote}")
        }
        Message::Decided { decision, csn, .. } => match csn {
            Some(csn) => format!("decided {decision:?} {csn}"),
            None => format!("decided {decision:?}"),
        },
        Message::Finished { decision, .. } => format!("finished {decision:?}"),
        Message::Forget { .. } => "forget".into(),
        Message::Query { .. } => "how did it end".into(),
        Message::AskHorizon => "ask horizon".into(),
        Message::Horizon { csn } => format!("horizon {csn}"),
    }
}

fn state(record: &protocol::Record) -> String {
    match (record.decision, record.accepted) {
        (Some(decision), _) => format!("{decision:?}"),
        (None, Some(accepted)) => format!("{:?} {}", accepted.verdict, accepted.ballot),
        (None, None) => format!("promise {}", record.promised),
    }
}
