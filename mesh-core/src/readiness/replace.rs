//! Which task is stopped because it is ill, so that ECS replaces it.
//!
//! One at a time of each service on a host, only after its time, and never while nobody else serves. Must not know how a
//! task is stopped, nor what made it ill.

use std::time::Duration;

use crate::id::TaskId;

/// A container that is to be stopped.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Stop {
    pub task: TaskId,
    /// Docker's id of it.
    pub container: String,
}

/// A task of one service on this host.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Member {
    pub is: Being,
    /// How long it may be unhealthy; `None`: for ever.
    pub stop_after: Option<Duration>,
}

/// How a task is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Being {
    Ready,
    /// Not ready yet, for so long.
    Starting(Duration),
    /// Not ready any more, for so long.
    Ill(Duration),
    /// It was told to stop.
    Stopping,
}

/// Which of the tasks of one service is to be stopped now, if any: the one that has been unhealthy for longest.
/// `healthy` is how many endpoints of the service are healthy, on any host.
pub fn to_stop(members: &[Member], healthy: usize) -> Option<usize> {
    if healthy == 0 {
        return None;
    }
    let ill = |member: &Member| match member.is {
        Being::Starting(since) | Being::Ill(since) => member.stop_after.filter(|after| since >= *after).map(|_| since),
        Being::Ready | Being::Stopping => None,
    };
    // One that stops, or starts in the place of one that did, may still make the next unnecessary.
    let under_way = |member: &Member| match member.is {
        Being::Stopping => true,
        Being::Starting(_) => member.stop_after.is_some() && ill(member).is_none(),
        Being::Ready | Being::Ill(_) => false,
    };
    if members.iter().any(under_way) {
        return None;
    }
    let of = |(at, member)| Some((ill(member)?, at));
    members.iter().enumerate().filter_map(of).max_by_key(|(since, at)| (*since, usize::MAX - at)).map(|(_, at)| at)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn member() -> impl Strategy<Value = Member> {
        let span = || (0_u64..200).prop_map(Duration::from_secs);
        let is = prop_oneof![
            Just(Being::Ready),
            span().prop_map(Being::Starting),
            span().prop_map(Being::Ill),
            Just(Being::Stopping),
        ];
        (is, prop::option::weighted(0.7, span())).prop_map(|(is, stop_after)| Member { is, stop_after })
    }

    proptest! {
        #[test]
        fn never_two_at_a_time_nor_the_last_nor_too_early(
            members in prop::collection::vec(member(), 0..6),
            healthy in 0_usize..4,
        ) {
            let Some(at) = to_stop(&members, healthy) else { return Ok(()) };
            prop_assert!(healthy > 0);
            prop_assert!(members.iter().all(|member| member.is != Being::Stopping));
            let after = members[at].stop_after;
            match members[at].is {
                Being::Starting(since) | Being::Ill(since) => prop_assert!(after.is_some_and(|after| since >= after)),
                Being::Ready | Being::Stopping => prop_assert!(false, "{:?}", members[at]),
            }
        }

        #[test]
        fn one_after_the_other_all_that_are_ill_go(count in 1_usize..6) {
            let ill = Member { is: Being::Ill(Duration::from_secs(60)), stop_after: Some(Duration::from_secs(30)) };
            let mut members = vec![ill; count];
            for left in (0..count).rev() {
                let at = to_stop(&members, 1).expect("one is ill");
                members[at].is = Being::Stopping;
                prop_assert_eq!(to_stop(&members, 1), None);
                members.remove(at);
                prop_assert_eq!(members.len(), left);
            }
        }
    }

    #[test]
    fn off_unless_asked_for() {
        let ill = Member { is: Being::Ill(Duration::MAX), stop_after: None };
        assert_eq!(to_stop(&[ill], 5), None);
    }
}
