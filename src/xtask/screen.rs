//! What people see: headings, sentences, tables. Colours only on a terminal (the `console` crate decides).

use std::time::{Duration, Instant};

use anyhow::Result;
use comfy_table::{LineStyle, Table, TableStyle};
use console::{Term, style};

/// Starts a part of a longer run.
pub fn heading(text: &str) {
    println!("\n{}", style(text).bold().cyan());
}

/// One sentence of explanation.
pub fn say(text: impl AsRef<str>) {
    println!("  {}", text.as_ref());
}

/// A command or an SQL statement that is about to run, and where.
pub fn statement(place: &str, sql: &str) {
    println!(
        "  {} {}",
        style(format!("{place} >")).dim(),
        style(sql).yellow()
    );
}

/// What a server answered.
pub fn answer(text: impl AsRef<str>) {
    for line in text.as_ref().lines() {
        println!("      {line}");
    }
}

/// Something that went as it must.
pub fn good(text: impl AsRef<str>) {
    println!("  {} {}", style("ok").green().bold(), text.as_ref());
}

/// Something that did not.
pub fn bad(text: impl AsRef<str>) {
    println!("  {} {}", style("FAILED").red().bold(), text.as_ref());
}

/// Does something that takes a while, and says how long it took.
///
/// # Errors
/// Those of `work`.
pub fn step<T>(what: &str, work: impl FnOnce() -> Result<T>) -> Result<T> {
    let terminal = Term::stdout();
    if terminal.is_term() {
        println!("  {} {what}", style("..").dim());
    }
    let started = Instant::now();
    let result = work();
    if terminal.is_term() {
        terminal.clear_last_lines(1)?;
    }
    let line = format!("{what} ({})", seconds(started.elapsed()));
    match &result {
        Ok(_) => good(line),
        Err(_) => bad(line),
    }
    result
}

/// A duration as people read it.
pub fn seconds(duration: Duration) -> String {
    format!("{:.1} s", duration.as_secs_f64())
}

/// Nothing but a line below the header.
const UNDERLINED_HEADER: TableStyle =
    TableStyle::new().header_separator(LineStyle::none().fill('─').junction('─'));

/// A table with a header, indented like everything else.
pub fn table<R>(header: &[&str], rows: R)
where
    R: IntoIterator<Item = Vec<String>>,
{
    let mut table = Table::new();
    table.load_style(UNDERLINED_HEADER);
    table.set_header(header.iter().copied());
    for row in rows {
        table.add_row(row);
    }
    for line in table.to_string().lines() {
        println!("  {}", line.trim_end());
    }
}
