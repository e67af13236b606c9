//! Types whose stored bytes mean the same on every node.
//!
//! Everything here is built in: its oid, and the oids inside its values (elements of an array, the type of a range), are equal on all
//! nodes of one major version. Types that hold oids of the catalog (`regclass`, `record`), and all that a user defined,
//! travel as text.

/// Sorted, for binary search.
const PLAIN: &[u32] = &[
    16,   // bool
    17,   // bytea
    18,   // "char"
    19,   // name
    20,   // int8
    21,   // int2
    23,   // int4
    25,   // text
    26,   // oid
    114,  // json
    142,  // xml
    199,  // json[]
    600,  // point
    601,  // lseg
    602,  // path
    603,  // box
    604,  // polygon
    628,  // line
    650,  // cidr
    651,  // cidr[]
    700,  // float4
    701,  // float8
    718,  // circle
    774,  // macaddr8
    790,  // money
    791,  // money[]
    829,  // macaddr
    869,  // inet
    1000, // bool[]
    1001, // bytea[]
    1002, // "char"[]
    1003, // name[]
    1005, // int2[]
    1007, // int4[]
    1009, // text[]
    1014, // bpchar[]
    1015, // varchar[]
    1016, // int8[]
    1017, // point[]
    1021, // float4[]
    1022, // float8[]
    1028, // oid[]
    1040, // macaddr[]
    1041, // inet[]
    1042, // bpchar
    1043, // varchar
    1082, // date
    1083, // time
    1114, // timestamp
    1115, // timestamp[]
    1182, // date[]
    1183, // time[]
    1184, // timestamptz
    1185, // timestamptz[]
    1186, // interval
    1187, // interval[]
    1231, // numeric[]
    1266, // timetz
    1270, // timetz[]
    1560, // bit
    1561, // bit[]
    1562, // varbit
    1563, // varbit[]
    1700, // numeric
    2950, // uuid
    2951, // uuid[]
    3220, // pg_lsn
    3614, // tsvector
    3615, // tsquery
    3802, // jsonb
    3807, // jsonb[]
    3904, // int4range
    3906, // numrange
    3908, // tsrange
    3910, // tstzrange
    3912, // daterange
    3926, // int8range
    4072, // jsonpath
];

/// Whether values of this type (for a domain: of its base type) may travel as they are stored.
pub fn travels_raw(base_type: u32) -> bool {
    PLAIN.binary_search(&base_type).is_ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_list_is_sorted() {
        assert!(PLAIN.is_sorted());
    }

    #[test]
    fn types_with_oids_inside_travel_as_text() {
        let regclass = 2205;
        let record = 2249;
        let user_defined = 16_384;
        assert!(
            ![regclass, record, user_defined]
                .into_iter()
                .any(travels_raw)
        );
    }
}
