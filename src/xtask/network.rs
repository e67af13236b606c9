//! Network namespaces: each server a host of its own, behind a router that can refuse to pass packets on.
//!
//! The router drops silently and by direction, as a broken network does: sockets on both sides notice nothing. Programs of this machine reach every
//! server all the time. Only root can make namespaces.

use std::fs;
use std::net::{IpAddr, Ipv4Addr};
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, bail, ensure};

use crate::{command, host};

/// Namespaces are named for the program that made them, so that those of a killed one can be told.
const PREFIX: &str = "mtm";
/// Where `ip netns` keeps its names.
const NAMESPACES: &str = "/run/netns";
/// Most nodes of a network.
const NODES_MAX: usize = 16;

/// Hosts of a cluster. Dropping it removes them.
#[derive(Debug)]
pub struct Network {
    /// Second number of all addresses.
    subnet: u8,
    owner: u32,
    nodes: usize,
    /// Directions that are cut, as indexes from 0.
    cuts: Vec<(usize, usize)>,
}

impl Network {
    /// Says why this machine cannot have one; nothing when it can.
    pub fn unavailable() -> Option<String> {
        if !host::is_root() {
            return Some("only root may make network namespaces".to_owned());
        }
        let probe = format!("{PREFIX}probe{}", std::process::id());
        let made = ip(&["netns", "add", &probe]).and_then(|()| ip(&["netns", "del", &probe]));
        made.err().map(|error| format!("{error:#}"))
    }

    /// Makes a router and `nodes` hosts.
    ///
    /// # Errors
    /// When the system refuses.
    pub fn create(nodes: usize) -> Result<Network> {
        ensure!((1..=NODES_MAX).contains(&nodes), "1 to {NODES_MAX} nodes");
        remove_leftovers();
        let owner = std::process::id();
        let network = Network {
            subnet: 64 + u8::try_from(owner % 128).unwrap_or(0),
            owner,
            nodes,
            cuts: Vec::new(),
        };
        let made = network.make_router();
        made.and_then(|()| (0..nodes).try_for_each(|node| network.make_node(node)))
            .context("cannot make the network")?;
        Ok(network)
    }

    /// Namespace of the node with this index (from 0).
    pub fn namespace(&self, node: usize) -> String {
        format!("{PREFIX}{}n{}", self.owner, node + 1)
    }

    /// Address of the node with this index (from 0).
    pub fn address(&self, node: usize) -> IpAddr {
        let third = u8::try_from(node + 1).unwrap_or(u8::MAX);
        IpAddr::V4(Ipv4Addr::new(10, self.subnet, third, 2))
    }

    /// Stops what goes from one node to another; the way back stays open.
    ///
    /// # Errors
    /// When the system refuses.
    pub fn cut_one_way(&mut self, from: usize, to: usize) -> Result<()> {
        if !self.cuts.contains(&(from, to)) {
            self.rule("add", from, to)?;
            self.cuts.push((from, to));
        }
        Ok(())
    }

    /// Stops everything between two nodes.
    ///
    /// # Errors
    /// When the system refuses.
    pub fn cut(&mut self, one: usize, other: usize) -> Result<()> {
        self.cut_one_way(one, other)?;
        self.cut_one_way(other, one)
    }

    /// Stops everything between one node and all others.
    ///
    /// # Errors
    /// When the system refuses.
    pub fn isolate(&mut self, node: usize) -> Result<()> {
        (0..self.nodes)
            .filter(|other| *other != node)
            .try_for_each(|other| self.cut(node, other))
    }

    /// Stops everything between the nodes named and the others.
    ///
    /// # Errors
    /// When the system refuses.
    pub fn split(&mut self, side: &[usize]) -> Result<()> {
        for &one in side {
            for other in (0..self.nodes).filter(|other| !side.contains(other)) {
                self.cut(one, other)?;
            }
        }
        Ok(())
    }

    /// Lets everything pass again.
    ///
    /// # Errors
    /// When the system refuses.
    pub fn heal(&mut self) -> Result<()> {
        while let Some(&(from, to)) = self.cuts.last() {
            self.rule("del", from, to)?;
            self.cuts.pop();
        }
        Ok(())
    }

    fn rule(&self, verb: &str, from: usize, to: usize) -> Result<()> {
        let (from, to) = (self.address(from).to_string(), self.address(to).to_string());
        let rule = ["rule", verb, "from", &from, "to", &to, "blackhole"];
        self.in_router(&[&["ip"], &rule[..]].concat())
    }

    fn router(&self) -> String {
        format!("{PREFIX}{}r", self.owner)
    }

    /// The router, this machine's way to it, and its ways to the nodes' networks.
    fn make_router(&self) -> Result<()> {
        let (router, subnet) = (self.router(), self.subnet);
        let (outer, inner) = (format!("m{}h", self.owner), format!("m{}r", self.owner));
        ip(&["netns", "add", &router])?;
        ip(&[
            "link", "add", &outer, "type", "veth", "peer", "name", &inner,
        ])?;
        ip(&["link", "set", &inner, "netns", &router])?;
        ip(&["addr", "add", &format!("10.{subnet}.0.1/24"), "dev", &outer])?;
        ip(&["link", "set", &outer, "up"])?;
        let within = format!("10.{subnet}.0.2/24");
        self.in_router(&["ip", "addr", "add", &within, "dev", &inner])?;
        self.in_router(&["ip", "link", "set", &inner, "up"])?;
        self.in_router(&["ip", "link", "set", "lo", "up"])?;
        self.in_router(&["sh", "-c", "echo 1 > /proc/sys/net/ipv4/ip_forward"])?;
        let (all, gateway) = (format!("10.{subnet}.0.0/16"), format!("10.{subnet}.0.2"));
        ip(&["route", "add", &all, "via", &gateway])
    }

    fn make_node(&self, node: usize) -> Result<()> {
        let (name, number, subnet) = (self.namespace(node), node + 1, self.subnet);
        let inner = format!("m{}n{number}", self.owner);
        let outer = format!("m{}p{number}", self.owner);
        let gateway = format!("10.{subnet}.{number}.1");
        ip(&["netns", "add", &name])?;
        ip(&[
            "link", "add", &inner, "type", "veth", "peer", "name", &outer,
        ])?;
        ip(&["link", "set", &inner, "netns", &name])?;
        ip(&["link", "set", &outer, "netns", &self.router()])?;
        let theirs = format!("{}/24", self.address(node));
        for words in [
            &["ip", "addr", "add", &theirs, "dev", &inner][..],
            &["ip", "link", "set", &inner, "up"],
            &["ip", "link", "set", "lo", "up"],
            &["ip", "route", "add", "default", "via", &gateway],
        ] {
            if words[1] == "route" {
                // The other end has to be up before the gateway can be reached.
                self.in_router(&["ip", "addr", "add", &format!("{gateway}/24"), "dev", &outer])?;
                self.in_router(&["ip", "link", "set", &outer, "up"])?;
            }
            inside(&name, words)?;
        }
        Ok(())
    }

    fn in_router(&self, words: &[&str]) -> Result<()> {
        inside(&self.router(), words)
    }
}

impl Drop for Network {
    fn drop(&mut self) {
        remove_of(self.owner);
    }
}

/// A command that runs in a namespace as the servers' account, in the same process.
///
/// # Errors
/// When that account does not exist.
pub fn server_command_in(namespace: &str, program: &Path) -> Result<Command> {
    let Some(user) = host::server_user()? else {
        bail!("only root may enter a network namespace")
    };
    let mut command = Command::new("ip");
    command
        .args(["netns", "exec", namespace, "setpriv", "--clear-groups"])
        .arg(format!("--reuid={}", user.uid.as_raw()))
        .arg(format!("--regid={}", user.gid.as_raw()))
        .arg(program)
        .current_dir("/")
        .env("HOME", "/")
        .env("USER", user.name);
    Ok(command)
}

fn ip(words: &[&str]) -> Result<()> {
    command::capture(Command::new("ip").args(words)).map(drop)
}

fn inside(namespace: &str, words: &[&str]) -> Result<()> {
    let mut command = Command::new("ip");
    command::capture(command.args(["netns", "exec", namespace]).args(words)).map(drop)
}

/// Removes the namespaces of a program; their links go with them.
fn remove_of(owner: u32) {
    for name in namespaces() {
        if owner_of(&name) == Some(owner) {
            let _ = ip(&["netns", "del", &name]);
        }
    }
    let _ = ip(&["link", "del", &format!("m{owner}h")]);
}

/// Removes what programs left that were killed.
fn remove_leftovers() {
    let mut owners: Vec<u32> = namespaces()
        .iter()
        .filter_map(|name| owner_of(name))
        .collect();
    owners.sort_unstable();
    owners.dedup();
    for owner in owners {
        if !Path::new(&format!("/proc/{owner}")).exists() || owner == std::process::id() {
            remove_of(owner);
        }
    }
}

fn namespaces() -> Vec<String> {
    let entries = fs::read_dir(NAMESPACES).into_iter().flatten().flatten();
    entries
        .map(|entry| entry.file_name().to_string_lossy().into_owned())
        .collect()
}

/// The process id in the name of one of our namespaces.
fn owner_of(name: &str) -> Option<u32> {
    let rest = name.strip_prefix(PREFIX)?;
    let digits = rest.find(|letter: char| !letter.is_ascii_digit())?;
    rest[..digits].parse().ok()
}
