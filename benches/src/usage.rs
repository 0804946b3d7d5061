//! What processes use, and what the machine does besides: CPU time, memory, the share of strangers.
//!
//! It must not know what the processes are.

use std::{
    collections::BTreeSet,
    fs,
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result};

/// Kernel clock ticks per second in `/proc`; 100 on every Linux that is not built by hand.
const TICKS: u64 = 100;

/// A process and all its descendants, now.
#[must_use]
pub fn tree(root: u32) -> BTreeSet<u32> {
    let mut found = BTreeSet::from([root]);
    let mut next = vec![root];
    while let Some(pid) = next.pop() {
        for thread in fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten().flatten() {
            let children = fs::read_to_string(thread.path().join("children")).unwrap_or_default();
            next.extend(
                children.split_whitespace().filter_map(|child| child.parse().ok()).filter(|c| found.insert(*c)),
            );
        }
    }
    found
}

/// CPU time that the processes have used so far, threads that have ended included.
#[must_use]
pub fn cpu(pids: &BTreeSet<u32>) -> Duration {
    let ticks: u64 =
        pids.iter().filter_map(|pid| ticks_of(&fs::read_to_string(format!("/proc/{pid}/stat")).ok()?)).sum();
    Duration::from_millis(ticks * 1000 / TICKS)
}

/// Fields 14 and 15 of `/proc/PID/stat`.
fn ticks_of(stat: &str) -> Option<u64> {
    // The second field, the command in brackets, may hold spaces.
    let mut fields = stat.rsplit_once(')')?.1.split_whitespace().skip(11);
    Some(fields.next()?.parse::<u64>().ok()? + fields.next()?.parse::<u64>().ok()?)
}

/// Memory that the processes hold, pages that they share counted once, in bytes.
#[must_use]
pub fn memory(pids: &BTreeSet<u32>) -> u64 {
    let of = |pid: &u32| pss_of(&fs::read_to_string(format!("/proc/{pid}/smaps_rollup")).ok()?);
    pids.iter().filter_map(of).sum()
}

fn pss_of(rollup: &str) -> Option<u64> {
    let line = rollup.lines().find_map(|line| line.strip_prefix("Pss:"))?;
    Some(line.split_whitespace().next()?.parse::<u64>().ok()? << 10)
}

/// Lets the kernel begin anew with what it remembers as the most that each of the processes held (proc_pid_clear_refs(5)).
///
/// # Errors
/// One of them has ended.
pub fn forget_high_water(pids: &BTreeSet<u32>) -> Result<()> {
    pids.iter().try_for_each(|pid| {
        let file = format!("/proc/{pid}/clear_refs");
        fs::write(&file, "5").with_context(|| format!("cannot write {file}"))
    })
}

/// The most that each of the processes held since it began or [`forget_high_water`], added up, in bytes; shared pages count for each.
#[must_use]
pub fn high_water(pids: &BTreeSet<u32>) -> u64 {
    pids.iter().filter_map(|pid| status(*pid, "VmHWM:")).sum()
}

/// What the processes hold now, added up, in bytes; shared pages count for each.
#[must_use]
pub fn resident(pids: &BTreeSet<u32>) -> u64 {
    pids.iter().filter_map(|pid| status(*pid, "VmRSS:")).sum()
}

/// What of it is backed by no file, in bytes: the rest is mostly the program itself.
#[must_use]
pub fn anonymous(pids: &BTreeSet<u32>) -> u64 {
    pids.iter().filter_map(|pid| status(*pid, "RssAnon:")).sum()
}

fn status(pid: u32, key: &str) -> Option<u64> {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix(key))?;
    Some(line.split_whitespace().next()?.parse::<u64>().ok()? << 10)
}

/// Watches the memory of processes until it is asked for the most that it saw.
#[derive(Debug)]
pub struct Watch {
    stop: Arc<AtomicBool>,
    most: Arc<AtomicU64>,
    watcher: Option<thread::JoinHandle<()>>,
}

impl Watch {
    #[must_use]
    pub fn start(pids: &BTreeSet<u32>) -> Self {
        let (stop, most) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
        let watcher = (!pids.is_empty()).then(|| {
            let (stop, most, pids) = (Arc::clone(&stop), Arc::clone(&most), pids.clone());
            thread::spawn(move || {
                while !stop.load(Ordering::Relaxed) {
                    most.fetch_max(memory(&pids), Ordering::Relaxed);
                    thread::park_timeout(Duration::from_millis(250));
                }
            })
        });
        Self { stop, most, watcher }
    }

    #[must_use]
    pub fn most(mut self) -> u64 {
        self.end();
        self.most.load(Ordering::Relaxed)
    }

    fn end(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(watcher) = self.watcher.take() {
            watcher.thread().unpark();
            // It only reads numbers; were it to panic, the figure would be 0 and be seen.
            watcher.join().ok();
        }
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        self.end();
    }
}

/// How much of the machine's CPU time went to others than a cgroup, this process and the idle loop.
#[derive(Debug)]
pub struct Strangers {
    cgroup: PathBuf,
    began: Instant,
    busy: Duration,
    ours: Duration,
}

impl Strangers {
    /// `cgroup` is where everything that is measured runs.
    ///
    /// # Errors
    /// The kernel does not say.
    pub fn watch(cgroup: &Path) -> Result<Self> {
        Ok(Self { cgroup: cgroup.to_owned(), began: Instant::now(), busy: busy()?, ours: ours(cgroup)? })
    }

    /// Their share of all CPUs since then, 0 to 1.
    ///
    /// # Errors
    /// The kernel does not say.
    pub fn share(&self) -> Result<f64> {
        let busy = busy()?.saturating_sub(self.busy);
        let strangers = busy.saturating_sub(ours(&self.cgroup)?.saturating_sub(self.ours));
        Ok((strangers.as_secs_f64() / self.began.elapsed().as_secs_f64() / cpus() as f64).clamp(0.0, 1.0))
    }
}

/// CPUs of this machine that we may use.
#[must_use]
pub fn cpus() -> usize {
    thread::available_parallelism().map_or(1, std::num::NonZero::get)
}

/// Time that all CPUs together were not idle since boot.
fn busy() -> Result<Duration> {
    let stat = fs::read_to_string("/proc/stat").context("cannot read /proc/stat")?;
    busy_of(&stat)
        .map(|ticks| Duration::from_millis(ticks * 1000 / TICKS))
        .context("/proc/stat has no line for all CPUs")
}

/// user, nice, system, (idle, iowait,) irq, softirq, steal.
fn busy_of(stat: &str) -> Option<u64> {
    let line = stat.lines().find_map(|line| line.strip_prefix("cpu "))?;
    let fields: Vec<u64> = line.split_whitespace().filter_map(|field| field.parse().ok()).collect();
    (fields.len() >= 8).then(|| [0, 1, 2, 5, 6, 7].iter().map(|&index| fields[index]).sum())
}

fn ours(cgroup: &Path) -> Result<Duration> {
    let path = cgroup.join("cpu.stat");
    let text = fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))?;
    let micros = text.lines().find_map(|line| line.strip_prefix("usage_usec "));
    let micros = micros.and_then(|micros| micros.parse().ok()).context("cpu.stat has no usage_usec")?;
    Ok(Duration::from_micros(micros) + cpu(&BTreeSet::from([std::process::id()])))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_read_whatever_the_command_is_called() {
        let stat = "12 (a ) b) S 1 12 12 0 -1 4194560 100 0 0 0 31 11 0 0 20 0 1 0 100 1000 10";
        assert_eq!(ticks_of(stat), Some(42));
        assert_eq!(ticks_of("nonsense"), None);
    }

    #[test]
    fn idle_and_waiting_is_not_busy() {
        assert_eq!(busy_of("cpu  1 2 4 1000 2000 8 16 32 0 0\ncpu0 1 1 1 1 1 1 1 1"), Some(63));
        assert_eq!(busy_of("cpu  1 2 3\n"), None);
    }

    #[test]
    fn this_process_is_in_its_own_tree_and_uses_memory() {
        let own = tree(std::process::id());
        assert!(own.contains(&std::process::id()));
        assert!(memory(&own) > 1 << 16, "{}", memory(&own));
        assert!(high_water(&own) >= 1 << 16);
        forget_high_water(&own).unwrap();
        assert!(high_water(&own) >= 1 << 16);
    }
}
