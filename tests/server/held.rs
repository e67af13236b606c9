//! Processes that are held at a failpoint, for cases that need a transaction to stay in some state.

use anyhow::Result;
use multimaster_tests::Rig;

/// Lets nodes hold their processes at failpoints; undone when dropped.
pub struct Held<'r> {
    rig: &'r Rig,
    nodes: Vec<usize>,
}

impl<'r> Held<'r> {
    pub fn new(rig: &'r Rig) -> Self {
        Held {
            rig,
            nodes: Vec::new(),
        }
    }

    pub fn hold(&mut self, node: usize, point: &str) -> Result<()> {
        self.nodes.push(node);
        arm(self.rig, node, &format!("{point}=hold"))
    }

    pub fn release(&mut self, node: usize) -> Result<()> {
        arm(self.rig, node, "")
    }
}

impl Drop for Held<'_> {
    fn drop(&mut self) {
        for node in &self.nodes {
            // A case that fails here costs its cluster anyway.
            let _ = arm(self.rig, *node, "");
        }
    }
}

pub fn arm(rig: &Rig, node: usize, value: &str) -> Result<()> {
    rig.session(node)?
        .run(&format!("SET multimaster.failpoint = '{value}'"))
}
