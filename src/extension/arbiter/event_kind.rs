//! The words in the column `event` of `mtm.events`; docs/monitoring.md explains each.

/// Defines the kinds and the word that users read for each.
macro_rules! kinds {
    ($($(#[$doc:meta])* $kind:ident => $word:literal,)+) => {
        /// What has happened to a node.
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        pub enum EventKind {
            $($(#[$doc])* $kind,)+
        }

        impl EventKind {
            /// The word that users read.
            pub fn word(self) -> &'static str {
                match self {
                    $(EventKind::$kind => $word,)+
                }
            }
        }

        #[cfg(test)]
        const WORDS: &[&str] = &[$($word),+];
    };
}

kinds! {
    /// The link to its arbiter stands.
    Connected => "connected",
    /// The link to its arbiter has ended.
    Lost => "lost",
    Excluded => "excluded",
    Admitted => "admitted",
    Generation => "generation",
    /// It is no member of the generation.
    Outside => "outside",
    Recovers => "recovers",
    Online => "online",
    /// Its recovery has given up.
    Failed => "failed",
    Stuck => "stuck",
    GetsOn => "gets on",
    /// Much WAL is kept for it.
    Lag => "lag",
    NeedsCopy => "needs copy",
    OldCopy => "old copy",
    UnequalSettings => "unequal settings",
    SettingsRefused => "settings refused",
    /// The referee can be asked again, or why it is not.
    Referee => "referee",
}

impl std::fmt::Display for EventKind {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.word())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    /// Words of the table that begins with this line, its first column.
    fn documented(first_line: &str) -> BTreeSet<&'static str> {
        let page = include_str!("../../../docs/monitoring.md");
        let (_, table) = page.split_once(first_line).expect("the table is there");
        table
            .lines()
            .skip(2)
            .map_while(|line| line.strip_prefix("| `"))
            .filter_map(|line| line.split('`').next())
            .collect()
    }

    #[test]
    fn every_event_is_documented_and_every_documented_event_exists() {
        let known: BTreeSet<&str> = WORDS.iter().copied().collect();
        assert_eq!(documented("| `event` | whom it concerns |"), known);
    }
}
