//! Keeps clear passwords out of what is sent.
//!
//! `CREATE ROLE r PASSWORD 'secret'` is sent with the stored verifier in place of the literal, so every node stores the same verifier and no
//! clear password gets into WAL. The literal is found by the position of the option that the parser reports; what cannot be found is refused
//! by the caller, never sent.

use std::ops::Range;

/// The statement with the literal of its password option replaced.
///
/// `option` is the byte position of the option's first word (`PASSWORD` or `ENCRYPTED`) in `statement`, `escapes` says that
/// backslashes escape in plain literals (standard_conforming_strings is off). `None` when no literal stands there.
pub fn replace(statement: &str, option: usize, escapes: bool, replacement: &str) -> Option<String> {
    let literal = find_literal(statement.as_bytes(), option, escapes)?;
    let mut replaced = String::with_capacity(statement.len() + replacement.len());
    replaced.push_str(statement.get(..literal.start)?);
    replaced.push('\'');
    replaced.push_str(&replacement.replace('\'', "''"));
    replaced.push('\'');
    replaced.push_str(statement.get(literal.end..)?);
    Some(replaced)
}

fn find_literal(text: &[u8], option: usize, escapes: bool) -> Option<Range<usize>> {
    let mut position = option;
    if let Some(after) = skip_word(text, position, b"encrypted") {
        position = skip_blank(text, after)?;
    }
    let after = skip_word(text, position, b"password")?;
    let start = skip_blank(text, after)?;
    let end = match (text.get(start)?, text.get(start + 1)) {
        (b'\'', _) => quoted_end(text, start, escapes)?,
        (b'e' | b'E', Some(b'\'')) => quoted_end(text, start + 1, true)?,
        (b'$', _) => dollar_end(text, start)?,
        // U&'...' may be followed by UESCAPE; nobody writes passwords so, and the caller refuses.
        _ => return None,
    };
    Some(start..end)
}

fn skip_word(text: &[u8], start: usize, word: &[u8]) -> Option<usize> {
    let end = start + word.len();
    text.get(start..end)?
        .eq_ignore_ascii_case(word)
        .then_some(end)
}

/// Skips white space and comments.
fn skip_blank(text: &[u8], mut position: usize) -> Option<usize> {
    loop {
        let rest = text.get(position..)?;
        if rest.starts_with(b"--") {
            position += rest
                .iter()
                .position(|byte| *byte == b'\n' || *byte == b'\r')?;
        } else if rest.starts_with(b"/*") {
            position = comment_end(text, position)?;
        } else if rest.first()?.is_ascii_whitespace() || rest[0] == 0x0b {
            position += 1;
        } else {
            return Some(position);
        }
    }
}

/// Block comments nest.
fn comment_end(text: &[u8], start: usize) -> Option<usize> {
    let (mut depth, mut position) = (0usize, start);
    loop {
        let rest = text.get(position..)?;
        if rest.starts_with(b"/*") {
            depth += 1;
            position += 2;
        } else if rest.starts_with(b"*/") {
            depth -= 1;
            position += 2;
            if depth == 0 {
                return Some(position);
            }
        } else if rest.is_empty() {
            return None;
        } else {
            position += 1;
        }
    }
}

/// End of a literal whose opening quote is at `start`, its continuations on following lines included.
fn quoted_end(text: &[u8], start: usize, escapes: bool) -> Option<usize> {
    let mut position = start + 1;
    loop {
        match text.get(position)? {
            b'\\' if escapes => position += 2,
            b'\'' if text.get(position + 1) == Some(&b'\'') => position += 2,
            b'\'' => match continuation(text, position + 1) {
                Some(next) => position = next + 1,
                None => return Some(position + 1),
            },
            _ => position += 1,
        }
    }
}

/// Position of a quote that continues the literal: separated by white space with a line break in it.
fn continuation(text: &[u8], after: usize) -> Option<usize> {
    let next = skip_blank(text, after)?;
    let has_line_break = text[after..next]
        .iter()
        .any(|byte| matches!(byte, b'\n' | b'\r'));
    (has_line_break && text[next] == b'\'').then_some(next)
}

fn dollar_end(text: &[u8], start: usize) -> Option<usize> {
    let tag_length = text
        .get(start + 1..)?
        .iter()
        .position(|byte| *byte == b'$')?
        + 2;
    let tag = &text[start..start + tag_length];
    let body = start + tag_length;
    let length = text[body..]
        .windows(tag_length)
        .position(|window| window == tag)?;
    Some(body + length + tag_length)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn replaced(statement: &str, escapes: bool) -> Option<String> {
        let lower = statement.to_ascii_lowercase();
        let option = lower
            .find("encrypted")
            .or_else(|| lower.find("password"))
            .unwrap();
        replace(statement, option, escapes, "V$'x")
    }

    #[test]
    fn every_form_of_literal_is_replaced() {
        for literal in [
            "'secret'",
            "'se''cret'",
            "E'se\\'cret'",
            "$$secret$$",
            "$a$se$$cret$a$",
            "'se'\n  'cret'",
            "''",
        ] {
            for option in [
                "PASSWORD",
                "ENCRYPTED PASSWORD",
                "password /* it's /* nested */ */",
                "password -- 'it'\n",
            ] {
                let statement = format!("CREATE ROLE \"rölle\" {option} {literal} LOGIN");
                let expected = format!("CREATE ROLE \"rölle\" {option} 'V$''x' LOGIN");
                assert_eq!(
                    replaced(&statement, false).as_deref(),
                    Some(expected.as_str())
                );
            }
        }
    }

    #[test]
    fn nothing_of_the_secret_remains() {
        let statement = "ALTER USER u PASSWORD 'sec\\'ret' VALID UNTIL 'infinity'";
        assert_eq!(
            replaced(statement, true).unwrap(),
            "ALTER USER u PASSWORD 'V$''x' VALID UNTIL 'infinity'"
        );
    }

    #[test]
    fn what_is_no_literal_is_refused() {
        for statement in [
            "ALTER ROLE r PASSWORD NULL",
            "ALTER ROLE r PASSWORD U&'x'",
            "ALTER ROLE r PASSWORD 'open",
        ] {
            assert_eq!(replaced(statement, false), None, "{statement}");
        }
    }
}
