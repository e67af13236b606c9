//! What a receiver asks of the plugin.
//!
//! Core's walreceiver library knows no options of other plugins; it can only name publications. So the receiver names
//! its major version there (`pg15`): stored bytes are exchanged between equal majors alone, others get text.

/// Whether the receiver that named these publications runs `major`. A receiver that names no version is taken to.
pub fn same_major(publications: &str, major: u32) -> bool {
    publications
        .split(|c: char| !c.is_ascii_alphanumeric())
        .filter_map(|name| name.strip_prefix("pg")?.parse::<u32>().ok())
        .all(|named| named == major)
}

/// What a receiver names that recovers: it wants the transactions of all nodes, each when it commits.
pub const RECOVERY: &str = "recovery";

/// Whether the receiver that named these publications recovers.
pub fn recovers(publications: &str) -> bool {
    publications
        .split(|c: char| !c.is_ascii_alphanumeric())
        .any(|name| name == RECOVERY)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_named_other_major_differs() {
        assert!(same_major("", 15));
        assert!(same_major("\"multimaster\"", 15));
        assert!(same_major("\"multimaster\",\"pg15\"", 15));
        assert!(!same_major("\"pg16\"", 15));
        assert!(same_major("pgx, pg_15", 15));
    }

    #[test]
    fn recovery_is_asked_for_by_name() {
        assert!(recovers("\"recovery\""));
        assert!(!recovers("\"multimaster\",\"pg15\""));
    }
}
