//! Connection strings: finding one value in them, and showing them without their secrets.
//!
//! libpq is the judge of whether a string is valid (`pg::remote::check_conninfo`); this module reads strings that passed.
//! Both of libpq's forms are read: `host=a port=5432` and `postgresql://user:password@host:port/database?option=value`.

/// Options whose values are secrets.
const SECRETS: [&str; 2] = ["password", "sslpassword"];

const HEX: &[u8; 16] = b"0123456789ABCDEF";

/// The options of a connection string in the order in which they were written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Conninfo {
    options: Vec<(String, String)>,
}

impl Conninfo {
    /// Reads a valid connection string; of an invalid one it reads what it can.
    pub fn parse(text: &str) -> Conninfo {
        let uri = ["postgresql://", "postgres://"]
            .iter()
            .find_map(|scheme| text.strip_prefix(scheme));
        let options = match uri {
            Some(rest) => parse_uri(rest),
            None => parse_pairs(text),
        };
        Conninfo { options }
    }

    /// The value of an option; the last one counts, as in libpq. Empty values count as absent.
    pub fn get(&self, name: &str) -> Option<&str> {
        let (_, value) = self.options.iter().rev().find(|(key, _)| key == name)?;
        Some(value.as_str()).filter(|value| !value.is_empty())
    }

    /// The string without its secrets, in the form of `name=value` pairs.
    pub fn without_secrets(&self) -> String {
        let shown = self
            .options
            .iter()
            .filter(|(name, _)| !SECRETS.contains(&name.as_str()));
        let pairs: Vec<String> = shown
            .map(|(name, value)| format!("{name}={}", quote(value)))
            .collect();
        pairs.join(" ")
    }
}

/// A value as it must stand in a `name=value` pair.
fn quote(value: &str) -> String {
    let plain = |c: char| !(c.is_whitespace() || c == '\'' || c == '\\');
    if !value.is_empty() && value.chars().all(plain) {
        return value.to_owned();
    }
    let escaped = value.replace('\\', "\\\\").replace('\'', "\\'");
    format!("'{escaped}'")
}

fn parse_pairs(text: &str) -> Vec<(String, String)> {
    let mut options = Vec::new();
    let mut rest = text.trim_start();
    while let Some((name, after)) = rest.split_once('=') {
        let (value, remaining) = take_value(after.trim_start());
        options.push((name.trim().to_owned(), value));
        rest = remaining.trim_start();
    }
    options
}

/// Takes one value, quoted or not, off the front of `text`.
fn take_value(text: &str) -> (String, &str) {
    let (quoted, text) = match text.strip_prefix('\'') {
        Some(inner) => (true, inner),
        None => (false, text),
    };
    let mut value = String::new();
    let mut chars = text.char_indices();
    while let Some((at, c)) = chars.next() {
        match c {
            '\\' => value.extend(chars.next().map(|(_, escaped)| escaped)),
            '\'' if quoted => return (value, &text[at + 1..]),
            c if !quoted && c.is_whitespace() => return (value, &text[at..]),
            c => value.push(c),
        }
    }
    (value, "")
}

fn parse_uri(rest: &str) -> Vec<(String, String)> {
    let (rest, query) = rest.split_once('?').unwrap_or((rest, ""));
    let (authority, database) = rest.split_once('/').unwrap_or((rest, ""));
    let (user_info, hosts) = match authority.rsplit_once('@') {
        Some((user_info, hosts)) => (user_info, hosts),
        None => ("", authority),
    };
    let (user, password) = user_info.split_once(':').unwrap_or((user_info, ""));
    let (host, port) = split_hosts(hosts);
    let mut options = Vec::new();
    let parts = [
        ("user", user),
        ("password", password),
        ("host", &host),
        ("port", &port),
        ("dbname", database),
    ];
    for (name, value) in parts {
        if !value.is_empty() {
            options.push((name.to_owned(), decode_percent(value)));
        }
    }
    for pair in query.split('&').filter(|pair| !pair.is_empty()) {
        let (name, value) = pair.split_once('=').unwrap_or((pair, ""));
        options.push((decode_percent(name), decode_percent(value)));
    }
    options
}

/// Splits `a:1,b,[::1]:2` into hosts `a,b,::1` and ports `1,,2`; no ports at all give an empty list.
fn split_hosts(hosts: &str) -> (String, String) {
    let mut names = Vec::new();
    let mut ports = Vec::new();
    for host in hosts.split(',') {
        let (name, port) = match host.strip_prefix('[').and_then(|h| h.split_once(']')) {
            Some((name, after)) => (name, after.strip_prefix(':').unwrap_or("")),
            None => host.split_once(':').unwrap_or((host, "")),
        };
        names.push(name);
        ports.push(port);
    }
    let ports = if ports.iter().all(|port| port.is_empty()) {
        String::new()
    } else {
        ports.join(",")
    };
    (names.join(","), ports)
}

fn decode_percent(text: &str) -> String {
    let digit = |byte: u8| HEX.iter().position(|&hex| hex == byte.to_ascii_uppercase());
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let [first, tail @ ..] = rest {
        rest = tail;
        match tail {
            [high, low, after @ ..] if *first == b'%' => match (digit(*high), digit(*low)) {
                (Some(high), Some(low)) => {
                    bytes.push((high * 16 + low) as u8);
                    rest = after;
                }
                _ => bytes.push(*first),
            },
            _ => bytes.push(*first),
        }
    }
    String::from_utf8_lossy(&bytes).into_owned()
}

#[cfg(test)]
mod tests {
    use super::Conninfo;

    #[test]
    fn pairs_with_quotes_and_escapes() {
        let conninfo =
            Conninfo::parse(r"host=a port = 5433 password='it\'s \\ secret' dbname=x\ y");
        assert_eq!(conninfo.get("host"), Some("a"));
        assert_eq!(conninfo.get("port"), Some("5433"));
        assert_eq!(conninfo.get("password"), Some(r"it's \ secret"));
        assert_eq!(conninfo.get("dbname"), Some("x y"));
    }

    #[test]
    fn uri_with_everything() {
        let conninfo = Conninfo::parse(
            "postgresql://me:s%40crt@[::1]:5433,b/db%20name?connect_timeout=3&sslpassword=x",
        );
        assert_eq!(conninfo.get("user"), Some("me"));
        assert_eq!(conninfo.get("password"), Some("s@crt"));
        assert_eq!(conninfo.get("host"), Some("::1,b"));
        assert_eq!(conninfo.get("port"), Some("5433,"));
        assert_eq!(conninfo.get("dbname"), Some("db name"));
        assert_eq!(conninfo.get("connect_timeout"), Some("3"));
    }

    #[test]
    fn secrets_are_not_shown() {
        let uri = Conninfo::parse("postgres://me:secret@h/d?sslpassword=secret").without_secrets();
        assert_eq!(uri, "user=me host=h dbname=d");
        let pairs = Conninfo::parse("host=h password = 'sec ret' application_name='a b'");
        assert_eq!(pairs.without_secrets(), "host=h application_name='a b'");
    }

    #[test]
    fn the_last_value_counts() {
        let conninfo = Conninfo::parse("host=a host=b port=''");
        assert_eq!(conninfo.get("host"), Some("b"));
        assert_eq!(conninfo.get("port"), None);
    }

    #[test]
    fn broken_strings_end() {
        for text in [
            "host",
            "=",
            "host='a",
            "a=\\",
            "postgres://%",
            "postgres://[::1",
            "a=b=c d",
        ] {
            let _ = Conninfo::parse(text).without_secrets();
        }
    }
}
