//! Steps with static arrays: what a captured graph reads, what cannot be captured; `double` starts each case in a process of
//! its own.

use std::mem::offset_of;
use std::sync::Arc;

use kvarn::pool::AttendOptions;

use super::cases::{CAPTURING, OTHER, STREAM, books, read};
use super::steps::*;
use crate::params::{AppendParams, AttendParams, SEAL_WORDS, SHARE_WORDS};
use crate::{ErrorKind, Pool, StaticArrays, Step};

/// Arrays that a launch of `append` and of `attend` reads, with seals and items that count.
fn sealed(launch: u64) -> Vec<i32> {
    let seals = address(launch, offset_of!(AppendParams, seals));
    let count = i32::from_ne_bytes(parameter(launch, offset_of!(AppendParams, seals_count)));
    let words = read(seals, count as usize * SEAL_WORDS);
    words.chunks_exact(SEAL_WORDS).map(|seal| seal[0]).collect()
}

/// Positions of the queries of what thread blocks begin with, for the first head.
fn positions(launch: u64) -> Vec<i32> {
    let [_, blocks, _] = launched(launch);
    let words = read(address(launch, offset_of!(AttendParams, shares)), blocks as usize * SHARE_WORDS);
    let shares = words.chunks_exact(SHARE_WORDS).filter(|share| share[1] == 0 && share[2] > 0);
    shares.map(|share| share[4 + 8]).collect()
}

#[test]
#[ignore = "needs the double"]
fn captured_step() {
    let pool = pool();
    let sequences = [pool.core().create(), pool.core().create()];
    prompt(&pool, &sequences[..1], G - 4);
    prompt(&pool, &sequences[1..], 5);
    let arrays = StaticArrays::new(&pool, &[1, 1], 4 * G).unwrap();
    let plan = || pool.step(&sequences, &[1, 1], &[0, 0], Some(&arrays)).unwrap();
    let first = books("double_launches");
    let step = plan();
    forward(&step, STREAM).unwrap();
    step.open().finish().unwrap();

    let step = plan();
    let (allocated, copies) = (calls(c"cuMemAlloc_v2"), calls(c"cuMemcpyHtoDAsync_v2"));
    forward(&step, CAPTURING).unwrap();
    assert_eq!((calls(c"cuMemAlloc_v2"), calls(c"cuMemcpyHtoDAsync_v2")), (allocated, copies));
    let captured = first + 2 * LAYERS as u64;
    let (append_at, attend_at) = (captured, captured + 1);
    // One launch is like another: eager, captured, in every layer.
    for layer in 0..2 * LAYERS as u64 {
        assert_eq!(launched(first + 2 * layer)[..2], launched(append_at)[..2]);
        assert_eq!(launched(first + 2 * layer + 1)[..2], launched(attend_at)[..2]);
    }
    assert_eq!((launched(append_at)[0], launched(attend_at)[0]), (APPEND, ATTEND));

    // What was recorded has not run: it is no append yet.
    let text = "the append of layer 0 was recorded into a graph: expected the graph to run before finish; call \
                step.replay(graph)";
    assert_eq!(step.open().finish().unwrap_err().to_string(), text);
    refused(attend(&step, 0, STREAM), ErrorKind::Value, &text.replace("finish", "a read"));
    step.send(STREAM).unwrap();
    step.replayed();
    assert_eq!(positions(attend_at), [G as i32 - 3, 6]);
    assert_eq!(sealed(append_at), [-1, -1]);
    step.open().finish().unwrap();
    assert_eq!(pool.core().view(sequences[0]).unwrap().length, G - 2);

    // Later steps arrive where the captured launches read, seals included.
    let mut sealing = 0;
    for length in G - 1..2 * G + 2 {
        let step = plan();
        assert_eq!(step.open().plan().sequences[0].after.length, length);
        step.send(if length % 2 == 0 { STREAM } else { OTHER }).unwrap();
        let mut pages: Vec<i32> = step
            .open()
            .plan()
            .sequences
            .iter()
            .flat_map(|sequence| sequence.seals.iter().map(|seal| seal.page as i32))
            .collect();
        sealing += pages.len();
        pages.resize(sequences.len(), -1);
        assert_eq!(sealed(append_at), pages);
        assert!(positions(attend_at).contains(&(length as i32 - 1)));
        step.replayed();
        step.open().finish().unwrap();
    }
    assert_eq!((calls(c"cuMemAlloc_v2"), sealing), (allocated, 3));

    // An eager step of the same arrays goes on, and its own launches are the same.
    let step = plan();
    let launches = books("double_launches");
    forward(&step, STREAM).unwrap();
    assert_eq!(launched(launches)[..2], launched(append_at)[..2]);
    let text = "layer 0 was appended to in this step: expected none before a replay, which appends to all; plan a new step";
    refused(step.send(STREAM), ErrorKind::Value, text);
    step.open().finish().unwrap();
}

/// A slot that a fork shares is copied by the step that writes to it: before its launches, or before the replay of a graph,
/// which records no copy.
#[test]
#[ignore = "needs the double"]
fn forked_step() {
    let pool = pool();
    let parent = pool.core().create();
    prompt(&pool, &[parent], G + 5);
    let copies = || calls(c"cuMemcpyDtoDAsync_v2");
    let fork = |count: usize| -> Vec<_> { (0..count).map(|_| pool.core().fork(parent).unwrap()).collect() };

    let eager = fork(1);
    let step = pool.step(&eager, &[1], &[0], None).unwrap();
    let copy = step.open().plan().sequences[0].copy.unwrap();
    let bytes = pool.core().layout().layers[0].slot_bytes;
    let mark = |slot: usize, value: u8| {
        let at = pool.cache(&pool.core().layout().layers[0]).slots + (slot * bytes) as u64;
        // SAFETY: memory of the double is the host's; the slot lies within it.
        unsafe { std::slice::from_raw_parts_mut(at as *mut u8, bytes) }.fill(value);
        at
    };
    let (from, to) = (mark(copy.from, 7), mark(copy.to, 9));
    forward(&step, STREAM).unwrap();
    // SAFETY: as above.
    let found = [from, to].map(|at| unsafe { std::slice::from_raw_parts(at as *const u8, bytes) });
    assert!(
        found.iter().all(|slot| slot.iter().all(|&byte| byte == 7)),
        "the whole slot, and the right way round"
    );
    assert_eq!(copies(), LAYERS as u64);
    step.open().finish().unwrap();

    let pair = fork(2);
    let arrays = StaticArrays::new(&pool, &[1, 1], 4 * G).unwrap();
    let plan = || pool.step(&pair, &[1, 1], &[0, 0], Some(&arrays)).unwrap();
    let warm = plan();
    forward(&warm, STREAM).unwrap();
    warm.open().abandon();
    let before = copies();
    let step = plan();
    forward(&step, CAPTURING).unwrap();
    assert_eq!(copies(), before, "nothing is recorded that later steps would do again");
    step.send(STREAM).unwrap();
    assert_eq!(copies(), before + 2 * LAYERS as u64);
    step.replayed();
    step.open().finish().unwrap();
    let step = plan();
    step.send(STREAM).unwrap();
    assert_eq!(copies(), before + 2 * LAYERS as u64, "slots of their own by now");
    step.replayed();
    step.open().finish().unwrap();
}

#[test]
#[ignore = "needs the double"]
fn capture_refused() {
    let pool = pool();
    let sequence = pool.core().create();
    prompt(&pool, &[sequence], 3);
    let launches = books("double_launches");
    let step = pool.step(&[sequence], &[1], &[0], None).unwrap();
    let text = "append or attend during a capture: expected a step with static arrays, which stay where the graph reads \
                them; make them with Pool.static_arrays and plan the step with Pool.step(…, arrays=…)";
    refused(append(&step, 0, CAPTURING), ErrorKind::Cuda, text);
    refused(attend(&step, 0, CAPTURING), ErrorKind::Cuda, text);
    let text = "a step without what a graph reads: expected one whose static arrays served a captured step; capture one, \
                and plan this one with the same arrays";
    refused(step.send(STREAM), ErrorKind::Value, text);
    drop(step);

    let arrays = StaticArrays::new(&pool, &[1], G).unwrap();
    let plan = || pool.step(&[sequence], &[1], &[0], Some(&arrays)).unwrap();
    let step = plan();
    let cold = "during a capture: expected a call of the same kind before, which allocates what the graph needs; run the \
                step's calls once without a capture, with a step of the same static arrays";
    refused(append(&step, 0, CAPTURING), ErrorKind::Cuda, &format!("append {cold}"));
    refused(attend(&step, 0, CAPTURING), ErrorKind::Cuda, &format!("attend {cold}"));
    refused(step.send(STREAM), ErrorKind::Value, text);
    // Attention before the append is another kind than after it.
    (0..LAYERS).for_each(|layer| append(&step, layer, STREAM).unwrap());
    (0..LAYERS).for_each(|layer| attend(&step, layer, STREAM).unwrap());
    step.open().finish().unwrap();
    let launched = launches + 2 * LAYERS as u64;
    assert_eq!(books("double_launches"), launched);
    let step = plan();
    refused(attend(&step, 0, CAPTURING), ErrorKind::Cuda, &format!("attend {cold}"));
    append(&step, 0, CAPTURING).unwrap();
    attend(&step, 0, CAPTURING).unwrap();
    assert_eq!(books("double_launches"), launched + 2);
}

#[test]
#[ignore = "needs the double"]
fn long_chunks_left_out() {
    let pool = pool();
    let sequences = [pool.core().create(), pool.core().create()];
    let attend_up_to = |step: &Step, columns, stream| {
        let q = tensor(step.open().plan().tokens, 2 * KV_HEADS);
        // SAFETY: no logits and no denominators.
        unsafe { step.attend(0, &q, &AttendOptions::default(), None, &q, None, columns, stream) }
    };
    let step = pool.step(&sequences, &[1, 4], &[0, 0], None).unwrap();
    append(&step, 0, STREAM).unwrap();
    let first = books("double_launches");
    // Two query heads for each KV head.
    assert!(!attend_up_to(&step, 8, STREAM).unwrap());
    assert!(attend_up_to(&step, 7, STREAM).unwrap());
    assert_eq!((positions(first).len(), positions(first + 1)), (2, vec![0]));
    assert!(attend_up_to(&step, 1, STREAM).unwrap());
    assert_eq!(books("double_launches"), first + 2, "nothing is left to launch");
    drop(step);

    let arrays = StaticArrays::new(&pool, &[1, 4], 4 * G).unwrap();
    let step = pool.step(&sequences, &[1, 4], &[0, 0], Some(&arrays)).unwrap();
    let launches = books("double_launches");
    let error = attend_up_to(&step, 7, CAPTURING).unwrap_err();
    assert_eq!(
        error.to_string(),
        "attend to a long chunk during a capture: expected chunks that one kernel attends to, as more would read what no \
         replay sends; capture shorter steps"
    );
    assert_eq!(books("double_launches"), launches);
}

#[test]
#[ignore = "needs the double"]
fn static_arrays_refused() {
    let pool = pool();
    let sequence = pool.core().create();
    let text = |counts: &[usize], tokens| StaticArrays::new(&pool, counts, tokens).unwrap_err().to_string();
    assert!(text(&[], 9).starts_with("counts [] of static arrays: expected a new token or more"));
    assert!(text(&[0], 9).starts_with("counts [0] of static arrays: expected a new token or more"));
    assert!(
        text(&[4, 1], 3).starts_with("tokens 3 of static arrays: expected 4, the largest count, or more")
    );

    let arrays = StaticArrays::new(&pool, &[2], 5).unwrap();
    let refuse = |pool: &Arc<Pool>, sequence, count| {
        pool.step(&[sequence], &[count], &[0], Some(&arrays)).unwrap_err().to_string()
    };
    assert!(refuse(&pool, sequence, 1).starts_with("counts [1] with static arrays: expected [2]"));
    let other = self::pool();
    assert!(refuse(&other, other.core().create(), 2).starts_with("static arrays of another pool"));
    let step = pool.step(&[sequence], &[2], &[0], Some(&arrays)).unwrap();
    let second = pool.core().create();
    assert!(refuse(&pool, second, 2).starts_with("static arrays that an open step uses"));
    step.open().abandon();
    for _ in 0..2 {
        let step = pool.step(&[sequence], &[2], &[0], Some(&arrays)).unwrap();
        forward(&step, STREAM).unwrap();
        step.open().finish().unwrap();
    }
    assert!(
        refuse(&pool, sequence, 2)
            .starts_with("tokens of a sequence 6 with static arrays: expected at most 5")
    );
    // What was refused is not open: the sequence goes on without the arrays.
    assert_eq!(pool.core().stats().tables.open_steps, 0);
    prompt(&pool, &[sequence], 2);
}
