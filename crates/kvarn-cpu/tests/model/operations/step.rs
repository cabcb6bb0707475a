//! A forward pass of a few sequences: ragged counts, tokens held back, finished, abandoned, or left open.

use fastrand::Rng;

use super::Outcome;
use crate::contents::check_expansion;
use crate::open_step::{OpenStep, Request};
use crate::world::World;

/// Steps that are open at once.
const MOST_OPEN: usize = 3;

/// Attention is checked in one step of so many, of so many rows at most; a longer one seldom.
const ATTENTION: u8 = 6;
const ATTENTION_ROWS: usize = 24;

pub(super) fn run(world: &mut World, random: &mut Rng) -> Outcome {
    let requests = requests(world, random)?;
    let Some(mut open) = world.plan(&requests, random) else { return Some("refused: too full") };
    let fate = match random.u8(..10) {
        0 if world.open_steps.len() < MOST_OPEN => "left open",
        1 => "abandoned",
        _ => "finished",
    };
    let mut layers: Vec<usize> = (0..open.appended.len()).collect();
    random.shuffle(&mut layers);
    if fate != "finished" {
        layers.truncate(random.usize(..=layers.len()));
    }
    for layer in layers {
        append_and_look(world, &mut open, layer, random);
    }
    match fate {
        "left open" => world.open_steps.push(open),
        "abandoned" => world.abandon(open, random),
        _ => world.finish(open),
    }
    Some(fate)
}

/// Appends to one layer; now and then looks at it, before and after.
pub(super) fn append_and_look(world: &mut World, open: &mut OpenStep, layer: usize, random: &mut Rng) {
    let rows: usize = open.members.iter().map(|member| member.count).sum();
    let chance = if rows <= ATTENTION_ROWS { ATTENTION } else { 4 * ATTENTION };
    if random.u8(..chance) == 0 {
        world.check_attention(open, layer, random);
    }
    world.append(open, layer);
    if random.u8(..chance) == 0 {
        world.check_attention(open, layer, random);
    }
    if random.u8(..ATTENTION) == 0 {
        let index = random.usize(..open.members.len());
        let stored = &open.members[index].after;
        let tokens = stored.length().saturating_sub(2 * world.rule.group)..stored.length();
        let rotated = random.bool();
        check_expansion(&world.codec.layers[layer], stored, tokens, rotated, |first, k, v| {
            open.step.expand(layer, index, first, rotated, k, v)
        });
    }
}

/// One to four idle sequences, and what to append to them.
fn requests(world: &World, random: &mut Rng) -> Option<Vec<Request>> {
    let mut chosen = world.idle_sequences();
    random.shuffle(&mut chosen);
    chosen.truncate(1 + random.usize(..4).min(random.usize(..4)));
    let requests: Vec<Request> =
        chosen.into_iter().map(|sequence| request(world, sequence, random)).collect();
    (!requests.is_empty()).then_some(requests)
}

fn request(world: &World, sequence: usize, random: &mut Rng) -> Request {
    let group = world.rule.group;
    let length = world.sequences[sequence].stored.length();
    let count = match random.u8(..100) {
        0..60 => random.usize(..4),
        60..75 => random.usize(..20),
        // To the end of the tile, or one less, or one more.
        75..88 => group - length % group + random.usize(..3) - 1,
        88..96 => random.usize(..2 * group),
        _ => random.usize(2 * group..4 * group),
    };
    let hold = match random.u8(..10) {
        0..7 => 0,
        7 => count,
        _ => random.usize(..=count.min(12)),
    };
    Request { sequence, count, hold }
}
