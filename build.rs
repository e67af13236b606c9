//! Lets the unit tests of the extension be linked.
//!
//! A shared library may leave PostgreSQL's functions to the server that loads it. The program that cargo makes of the unit tests is linked like any
//! program, for which a linker wants all symbols. The tests call none of PostgreSQL's: what needs a server is tested on servers (tests/).

fn main() {
    println!("cargo:rerun-if-changed=build.rs");
    println!("cargo:rustc-link-arg=-Wl,--unresolved-symbols=ignore-all");
}
