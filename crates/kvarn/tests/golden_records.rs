//! The golden records of format version 1 decode to the values of their list; see `tests/golden/make_records.py`.

use std::fs;
use std::path::Path;

use kvarn::codec::{DecodeScratch, decode_matrix};
use kvarn::record::read_records;

fn checksum(values: &[f32]) -> String {
    let bytes: Vec<u8> = values.iter().flat_map(|value| value.to_le_bytes()).collect();
    format!("{:08x}", crc32fast::hash(&bytes))
}

#[test]
fn golden_records_decode_to_the_same_bits() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/golden/records_v1");
    let list = fs::read_to_string(folder.join("values.txt")).unwrap();
    let mut files = 0;
    for line in list.lines() {
        let [name, _, _, k_expected, v_expected] = line.split(' ').collect::<Vec<_>>()[..] else {
            panic!("{line:?}: expected a name and four checksums");
        };
        let (header, records) = read_records(&mut fs::File::open(folder.join(name)).unwrap()).unwrap();
        let (config, layout) = (header.config, header.config.layout());
        let (group, head_dim) = (config.group(), config.head_dim());
        let (mut k, mut v, mut scratch) = (Vec::new(), Vec::new(), DecodeScratch::default());
        for record in records.chunks_exact(layout.record_bytes) {
            let mut tile = vec![0.0; group * head_dim];
            decode_matrix(&layout.key, record, &mut scratch, &mut tile);
            k.extend((0..group * head_dim).map(|at| tile[at % head_dim * group + at / head_dim]));
            decode_matrix(&layout.value, record, &mut scratch, &mut tile);
            v.extend(tile);
        }
        assert_eq!([checksum(&k), checksum(&v)], [k_expected, v_expected], "{name}");
        files += 1;
    }
    assert_eq!(files, 24);
}
