//! A row's key, as its owner would write it: `(a, b)=(1, x)`.
//!
//! It is made when applying has just failed, when no function of PostgreSQL may be called any more; so the common types of keys
//! are written here, and others as bytes.

use wire::stream::{Field, ValueFormat};

/// Longest text of a key, in bytes, beyond which it is cut.
const KEY_BYTES_MAX: usize = 200;

/// One column of a key.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KeyColumn {
    pub name: String,
    pub format: ValueFormat,
}

/// Writes the key of which `values` are the columns' values.
pub fn describe<'v>(columns: &[KeyColumn], values: impl Iterator<Item = Field<'v>>) -> String {
    let names: Vec<_> = columns.iter().map(|column| column.name.as_str()).collect();
    let values: Vec<_> = columns
        .iter()
        .zip(values)
        .map(|(column, value)| value_text(column.format, value))
        .collect();
    let mut text = format!("({})=({})", names.join(", "), values.join(", "));
    if text.len() > KEY_BYTES_MAX {
        text.truncate(text.floor_char_boundary(KEY_BYTES_MAX));
        text.push_str("...");
    }
    text
}

fn value_text(format: ValueFormat, value: Field<'_>) -> String {
    match (value, format) {
        (Field::Null, _) => "null".to_owned(),
        (Field::Unchanged, _) => "unchanged".to_owned(),
        (Field::Value(bytes), ValueFormat::Text) => String::from_utf8_lossy(bytes).into_owned(),
        (Field::Value(bytes), ValueFormat::Raw { base_type }) => raw_text(base_type, bytes),
    }
}

fn raw_text(base_type: u32, bytes: &[u8]) -> String {
    known_text(base_type, bytes).unwrap_or_else(|| hex_text(bytes))
}

fn known_text(base_type: u32, bytes: &[u8]) -> Option<String> {
    const BOOL: u32 = 16;
    const NAME: u32 = 19;
    const INT8: u32 = 20;
    const INT2: u32 = 21;
    const INT4: u32 = 23;
    const TEXT: u32 = 25;
    const OID: u32 = 26;
    const BPCHAR: u32 = 1042;
    const VARCHAR: u32 = 1043;
    const DATE: u32 = 1082;
    const TIMESTAMP: u32 = 1114;
    const TIMESTAMPTZ: u32 = 1184;
    const UUID: u32 = 2950;
    Some(match base_type {
        BOOL => if *bytes.first()? == 0 { "f" } else { "t" }.to_owned(),
        INT2 => i16::from_le_bytes(bytes.try_into().ok()?).to_string(),
        INT4 => i32::from_le_bytes(bytes.try_into().ok()?).to_string(),
        INT8 => i64::from_le_bytes(bytes.try_into().ok()?).to_string(),
        OID => u32::from_le_bytes(bytes.try_into().ok()?).to_string(),
        TEXT | VARCHAR | BPCHAR => String::from_utf8_lossy(bytes).into_owned(),
        NAME => String::from_utf8_lossy(bytes.split(|byte| *byte == 0).next()?).into_owned(),
        DATE => date_text(i64::from(i32::from_le_bytes(bytes.try_into().ok()?)))?,
        TIMESTAMP => timestamp_text(i64::from_le_bytes(bytes.try_into().ok()?))?,
        TIMESTAMPTZ => timestamp_text(i64::from_le_bytes(bytes.try_into().ok()?))? + "+00",
        UUID => uuid_text(bytes.try_into().ok()?),
        _ => return None,
    })
}

fn hex_text(bytes: &[u8]) -> String {
    let digits: String = bytes
        .iter()
        .take(32)
        .map(|byte| format!("{byte:02x}"))
        .collect();
    format!("\\x{digits}")
}

fn uuid_text(bytes: [u8; 16]) -> String {
    let mut text = format!("{:032x}", u128::from_be_bytes(bytes));
    for place in [20, 16, 12, 8] {
        text.insert(place, '-');
    }
    text
}

/// `days` since 2000-01-01 (Howard Hinnant's civil-from-days); `None` for infinities and years of other than four digits.
fn date_text(days: i64) -> Option<String> {
    const DAYS_FROM_0000_03_01: i64 = 730_425;
    const DAYS_OF_400_YEARS: i64 = 146_097;
    let shifted = days.checked_add(DAYS_FROM_0000_03_01)?;
    let era = shifted.div_euclid(DAYS_OF_400_YEARS);
    let day_of_era = shifted.rem_euclid(DAYS_OF_400_YEARS);
    let year_of_era =
        (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let month_from_march = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * month_from_march + 2) / 5 + 1;
    let month = if month_from_march < 10 {
        month_from_march + 3
    } else {
        month_from_march - 9
    };
    let year = year_of_era + 400 * era + i64::from(month <= 2);
    (0..10_000)
        .contains(&year)
        .then(|| format!("{year:04}-{month:02}-{day:02}"))
}

/// `micros` since 2000-01-01.
fn timestamp_text(micros: i64) -> Option<String> {
    const MICROS_OF_DAY: i64 = 86_400_000_000;
    let date = date_text(micros.div_euclid(MICROS_OF_DAY))?;
    let time = micros.rem_euclid(MICROS_OF_DAY);
    let (seconds, fraction) = (time / 1_000_000, time % 1_000_000);
    let mut text = format!(
        "{date} {:02}:{:02}:{:02}",
        seconds / 3600,
        seconds / 60 % 60,
        seconds % 60
    );
    if fraction != 0 {
        text += format!(".{fraction:06}").trim_end_matches('0');
    }
    Some(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn raw(base_type: u32, bytes: &[u8]) -> String {
        value_text(ValueFormat::Raw { base_type }, Field::Value(bytes))
    }

    #[test]
    fn common_types_of_keys_are_readable() {
        assert_eq!(raw(23, &(-7i32).to_le_bytes()), "-7");
        assert_eq!(raw(20, &i64::MAX.to_le_bytes()), "9223372036854775807");
        assert_eq!(raw(25, b"x y"), "x y");
        assert_eq!(raw(16, &[1]), "t");
        assert_eq!(raw(19, b"name\0\0"), "name");
        assert_eq!(raw(1082, &(-1i32).to_le_bytes()), "1999-12-31");
        assert_eq!(raw(1082, &8825i32.to_le_bytes()), "2024-02-29");
        assert_eq!(
            raw(1114, &(86_400_000_000i64 + 3_661_500_000).to_le_bytes()),
            "2000-01-02 01:01:01.5"
        );
        let uuid: Vec<u8> = (0..16).collect();
        assert_eq!(raw(2950, &uuid), "00010203-0405-0607-0809-0a0b0c0d0e0f");
    }

    #[test]
    fn what_is_not_known_or_not_right_is_shown_as_bytes() {
        assert_eq!(raw(1700, &[1, 0xab]), "\\x01ab");
        assert_eq!(raw(23, &[1]), "\\x01");
        assert_eq!(raw(1082, &i32::MAX.to_le_bytes()), "\\xffffff7f");
    }

    #[test]
    fn keys_show_names_and_values_and_are_cut() {
        let column = |name: &str| KeyColumn {
            name: name.into(),
            format: ValueFormat::Text,
        };
        let values = [Field::Value(b"1"), Field::Null].into_iter();
        assert_eq!(
            describe(&[column("a"), column("b")], values),
            "(a, b)=(1, null)"
        );
        let long = "ä".repeat(300);
        let cut = describe(&[column("a")], [Field::Value(long.as_bytes())].into_iter());
        assert!(cut.len() <= KEY_BYTES_MAX + 3 && cut.ends_with("..."));
    }
}
