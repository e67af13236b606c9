//! What takes no time in the model of members: heartbeats on whatever works, promises, ticks; and what is checked then.

use protocol::membership::{Elected, MembershipInput, MembershipMessage, Presence};
use protocol::{Gid, NodeId};

use crate::changing::Changing;

/// Rounds of heartbeats after which everybody knows whom everybody sees, or never will.
const ROUNDS_MAX: usize = 20;

impl Changing {
    /// Everything that takes no time.
    pub(crate) fn settle(&mut self) {
        let names = self.configured();
        self.repeat(|state| {
            // Nobody drops a node before it has heard of it.
            state.repeat(|state| names.iter().filter(|name| state.beat(*name)).count() > 0);
            names.iter().for_each(|name| state.promise(name));
            names.iter().filter(|name| state.tick(*name)).count() > 0
        });
        for name in names.iter() {
            self.log_commits(name);
            self.check_serving(name);
        }
        self.cluster.checker.demand_one_order();
        self.drop_vain();
    }

    /// Repeats it until it says that it has changed nothing.
    fn repeat(&mut self, round: impl Fn(&mut Self) -> bool) {
        for _ in 0..ROUNDS_MAX {
            if !round(self) {
                return;
            }
        }
        self.cluster
            .checker
            .demand(false, "I10", || "heartbeats do not come to an end".into());
    }

    /// Gives whatever promises it may.
    fn promise(&mut self, name: NodeId) {
        let withheld = self.members[&name].withheld;
        for peer in self.configured().without(name).iter() {
            if self.is_connected(name, peer) && !withheld.contains(peer) {
                self.members_mut(peer).promised_by.insert(name);
            }
        }
    }

    /// Says whether somebody has heard something new.
    fn beat(&mut self, name: NodeId) -> bool {
        let mut news = false;
        for peer in self.configured().without(name).iter() {
            let (Some(from), Some(to)) = (self.membership(name), self.membership(peer)) else {
                continue;
            };
            let current: Elected = to.current();
            let presence = Presence {
                current,
                ..from.presence()
            };
            let heard = self.members[&peer].heard.get(&name);
            if self.is_connected(name, peer) && heard != Some(&presence) {
                self.members_mut(peer).heard.insert(name, presence);
                let from = name;
                self.input(peer, MembershipInput::Presence { from, presence });
                news = true;
            }
        }
        news
    }

    /// Says whether there was anything new to say.
    fn tick(&mut self, name: NodeId) -> bool {
        let free = |peer: &NodeId| !self.members[peer].promised_by.contains(name);
        let unbound = self.configured().iter().filter(free).collect();
        let member = self.members_mut(name);
        let told = Some((unbound, member.withheld));
        let news = member.membership.is_some() && member.told != told;
        if news {
            member.told = told;
            self.input(name, MembershipInput::Tick { unbound });
        }
        news
    }

    /// LEASE.
    fn check_serving(&mut self, name: NodeId) {
        let member = &self.members[&name];
        let serves = member.open.is_some() && member.promised_by.len() >= self.members.len() / 2;
        if serves {
            let node = &self.cluster.nodes[&name];
            let holds = |gid: Gid| node.prepared.contains(&gid) || node.finished.contains_key(&gid);
            self.cluster.checker.on_serving(name, holds);
        }
    }

    /// Drops what cannot arrive, or can no longer make a difference.
    fn drop_vain(&mut self) {
        let connected = std::mem::take(&mut self.connected);
        let linked = |from: NodeId, to: NodeId| connected.contains(&(from.min(to), from.max(to)));
        self.cluster
            .network
            .retain(|envelope| linked(envelope.from, envelope.to));
        self.cluster.drop_vain();
        let members = &self.members;
        let num = |name: NodeId| {
            let membership = members.get(&name)?.membership.as_ref()?;
            Some(membership.current().generation.num)
        };
        self.letters.retain(|letter| {
            let wanted = match letter.msg {
                MembershipMessage::RequestVote { generation, .. }
                | MembershipMessage::Granted { generation, .. } => generation.num,
                MembershipMessage::Denied { num, .. } => num,
                MembershipMessage::Elected(elected) => elected.generation.num,
            };
            linked(letter.from, letter.to) && num(letter.to) < Some(wanted)
        });
        self.connected = connected;
    }
}
