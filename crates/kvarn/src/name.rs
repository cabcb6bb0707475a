//! The configuration names: `kvarn_k{K}v{V}_g{G}`, known to users of the published code.

use crate::{Bits, Error};

/// The recommended configurations. The grammar allows every pair of bit widths.
pub const PRESETS: [&str; 12] = [
    "kvarn_k8v8_g128",
    "kvarn_k8v4_g128",
    "kvarn_k4v4_g128",
    "kvarn_k4v2_g128",
    "kvarn_k3v3_g128",
    "kvarn_k2v2_g128",
    "kvarn_k8v8_g64",
    "kvarn_k8v4_g64",
    "kvarn_k4v4_g64",
    "kvarn_k4v2_g64",
    "kvarn_k3v3_g64",
    "kvarn_k2v2_g64",
];

/// `(key_bits, value_bits, group)` of a name. `kvarn` alone means `kvarn_k4v2_g128`.
pub fn parse_name(name: &str) -> Result<(Bits, Bits, usize), Error> {
    let wrong = || Error::Name { name: name.to_owned() };
    let name = if name == "kvarn" { "kvarn_k4v2_g128" } else { name };
    let rest = name.strip_prefix("kvarn_k").ok_or_else(wrong)?;
    let (key_bits, rest) = rest.split_once('v').ok_or_else(wrong)?;
    let (value_bits, group) = rest.split_once("_g").ok_or_else(wrong)?;
    let bits = |text: &str, what| match text {
        "2" | "3" | "4" | "8" => Bits::new(usize::from(text.as_bytes()[0] - b'0'), what),
        _ => Err(wrong()),
    };
    let group = match group {
        "64" => 64,
        "128" => 128,
        _ => return Err(wrong()),
    };
    Ok((bits(key_bits, "key_bits")?, bits(value_bits, "value_bits")?, group))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn presets_parse_and_nonsense_does_not() {
        for name in PRESETS {
            let (key_bits, value_bits, group) = parse_name(name).unwrap();
            assert_eq!(name, format!("kvarn_k{}v{}_g{group}", key_bits.get(), value_bits.get()));
        }
        assert_eq!(parse_name("kvarn"), parse_name("kvarn_k4v2_g128"));
        for name in [
            "",
            "kvarn_",
            "kvarn_k4v2",
            "kvarn_k5v2_g128",
            "kvarn_k4v2_g32",
            "kvarn_k4v2_g128x",
            "KVARN",
            "kvarn_k04v2_g128",
        ] {
            assert!(matches!(parse_name(name), Err(Error::Name { .. })), "{name}");
        }
    }
}
