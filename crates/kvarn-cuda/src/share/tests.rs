//! Shares of random plans: every piece of work once, in order, and about as many bytes each.

use proptest::prelude::*;

use super::*;

/// Items of query blocks with these parts, each of so many record tiles and slot tokens.
fn plan(blocks: &[Vec<(i32, i32)>]) -> AttendPlan {
    let mut made = AttendPlan::default();
    for block in blocks {
        for (part, &(tiles, tokens)) in block.iter().enumerate() {
            let mut words = [0; ITEM_WORDS];
            words[1] = tiles;
            words[3] = tokens;
            words[4] = part as i32;
            words[5] = block.len() as i32;
            made.items.extend(words);
        }
    }
    made
}

/// All work in its order: (item, head).
fn all(blocks: &[Vec<(i32, i32)>], kv_heads: usize) -> Vec<(i32, i32)> {
    let mut work = Vec::new();
    let mut first = 0;
    for block in blocks {
        for head in 0..kv_heads {
            work.extend((0..block.len()).map(|part| ((first + part) as i32, head as i32)));
        }
        first += block.len();
    }
    work
}

const COST: Cost = Cost { record: 13_824, token: 512 };

proptest! {
    #[test]
    fn every_piece_of_work_is_in_one_share(
        blocks in prop::collection::vec(
            prop::collection::vec(prop_oneof![(1..=32_i32, Just(0)), (Just(0), 1..=128_i32)], 1..40),
            0..40,
        ),
        kv_heads in 1..9_usize,
        resident in 1..400_usize,
        fixed in any::<bool>(),
        more in 0..3_u64,
        room_for in 0..500_000_u64,
    ) {
        let plan = plan(&blocks);
        let work = all(&blocks, kv_heads);
        let cost_of = |item: i32| COST.of_item(&plan.items[item as usize * ITEM_WORDS..][..ITEM_WORDS]);
        let total: u64 = work.iter().map(|&(item, _)| cost_of(item)).sum();
        let grid = Grid { resident, room: None };
        let grid = if fixed { grid.with_room(total + more * COST.record * resident as u64 * 20, room_for, COST) } else { grid };
        let made = shares(&plan.items, 0, kv_heads, grid, COST);
        let largest = work.iter().map(|&(item, _)| cost_of(item)).max().unwrap_or(0);

        let (mut at, mut ended) = (0, false);
        for share in made.chunks_exact(SHARE_WORDS) {
            let count = share[2] as usize;
            if count == 0 {
                ended = true;
                prop_assert!(fixed && share.iter().all(|&word| word == 0));
                continue;
            }
            prop_assert!(!ended, "shares without work come last");
            prop_assert_eq!((share[0], share[1]), work[at]);
            prop_assert_eq!(&share[4..], &plan.items[share[0] as usize * ITEM_WORDS..][..ITEM_WORDS]);
            let mine: u64 = work[at..at + count].iter().map(|&(item, _)| cost_of(item)).sum();
            let fair = total.div_ceil(resident as u64).max(LEAST_RECORDS * COST.record);
            prop_assert!(mine <= fair + largest, "{} of {}", mine, fair);
            at += count;
        }
        prop_assert_eq!(at, work.len());
        if let Some(room) = grid.room {
            prop_assert_eq!(made.len(), room * SHARE_WORDS);
        }
        if work.len() <= resident {
            prop_assert!(made.chunks_exact(SHARE_WORDS).all(|share| share[2] <= 1), "few pieces: one each");
        }
    }
}

#[test]
fn waves_take_less_and_less() {
    // Pieces of two records, which cost three.
    let plan = plan(&vec![vec![(2, 0); 10]; 400]);
    let grid = Grid { resident: 10, room: None };
    let pieces: Vec<i32> =
        shares(&plan.items, 0, 1, grid, COST).chunks_exact(SHARE_WORDS).map(|share| share[2]).collect();
    assert_eq!(pieces[..10], [360; 10], "nine tenths of 4,000");
    assert_eq!(pieces[10..20], [36; 10], "of 400");
    assert_eq!(pieces[20..30], [3; 10], "of 40");
    assert_eq!(pieces[30..], [2; 5], "even, and a piece more");
}

#[test]
fn large_pieces_are_not_doubled_up_in_one_wave() {
    // Twelve pieces for ten blocks: two of them would have two in one wave.
    let plan = plan(&[vec![(20, 0); 12]]);
    let grid = Grid { resident: 10, room: None };
    assert_eq!(shares(&plan.items, 0, 1, grid, COST).len(), 12 * SHARE_WORDS);
    let one_wave = Grid { resident: 10, room: Some(10) };
    assert_eq!(shares(&plan.items, 0, 1, one_wave, COST).len(), 10 * SHARE_WORDS, "no room for more");
}

#[test]
fn little_work_is_one_wave() {
    let plan = plan(&vec![vec![(3, 0); 10]; 8]);
    let grid = Grid { resident: 10, room: None };
    let made = shares(&plan.items, 0, 1, grid, COST);
    assert!(made.chunks_exact(SHARE_WORDS).all(|share| share[2] == 8));
    assert_eq!(made.len(), 10 * SHARE_WORDS);
}

#[test]
fn launches_have_shares_of_their_own_items() {
    let blocks: Vec<Vec<(i32, i32)>> = (1..6).map(|parts| vec![(3, 0); parts]).collect();
    let mut plan = plan(&blocks);
    plan.launches = vec![0, 3, 10];
    let (made, counts) = launches(&plan, 2, Grid { resident: 4, room: None }, COST);
    let work = |shares: &[i32]| -> Vec<(i32, i32)> {
        let first = |share: &[i32]| (share[0], share[1]);
        shares.chunks_exact(SHARE_WORDS).map(first).collect()
    };
    let mut at = 0;
    for (count, items) in counts.iter().zip([0..3, 3..10, 10..15]) {
        let own = &made[at * SHARE_WORDS..(at + count) * SHARE_WORDS];
        assert_eq!(work(own)[0], (items.start, 0), "a launch begins with its first item");
        assert!(work(own).iter().all(|(item, _)| items.contains(item)));
        let pieces: i32 = own.chunks_exact(SHARE_WORDS).map(|share| share[2]).sum();
        assert_eq!(pieces as usize, 2 * items.len(), "every piece of the launch, for both heads");
        at += count;
    }
    assert_eq!(at * SHARE_WORDS, made.len());
}
