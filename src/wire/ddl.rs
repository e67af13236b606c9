//! How a schema change travels.
