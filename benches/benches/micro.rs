//! How long each decision takes by itself: plans, names, balancing, merging, kernel writes; and what a tunnel takes.
//!
//! The same cases whose instructions `cargo xtask bench instructions` counts; here the clock, caches and all.

use criterion::{Criterion, criterion_group, criterion_main};
use mesh_worlds::{CASES, World};

fn decisions(criterion: &mut Criterion) {
    for case in CASES {
        let mut decide = (case.make)(&World::new(case.size));
        criterion.bench_function(case.name, |bencher| bencher.iter(&mut decide));
    }
    for case in mesh_tunnels::CASES {
        let mut act = (case.make)();
        criterion.bench_function(case.name, |bencher| bencher.iter(&mut act));
    }
}

criterion_group!(benches, decisions);
criterion_main!(benches);
