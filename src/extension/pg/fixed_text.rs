//! Text in a fixed array, for frames that PostgreSQL's errors jump over and that must therefore own nothing.

use std::ffi::{CStr, c_char};
use std::fmt;

/// At most `N - 1` bytes of text and a terminating zero; what is too long is cut at a character boundary, zero bytes are dropped.
pub struct FixedText<const N: usize> {
    bytes: [u8; N],
    length: usize,
}

impl<const N: usize> FixedText<N> {
    pub const fn new() -> Self {
        FixedText {
            bytes: [0; N],
            length: 0,
        }
    }

    pub fn as_ptr(&self) -> *const c_char {
        self.bytes.as_ptr().cast()
    }

    pub fn as_c_str(&self) -> &CStr {
        CStr::from_bytes_until_nul(&self.bytes).unwrap_or(c"")
    }
}

impl<const N: usize> fmt::Write for FixedText<N> {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        for character in text.chars().filter(|character| *character != '\0') {
            let width = character.len_utf8();
            if self.length + width >= N {
                break;
            }
            character.encode_utf8(&mut self.bytes[self.length..]);
            self.length += width;
        }
        Ok(())
    }
}
