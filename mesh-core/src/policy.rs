//! Who may call whom: allow and deny rules by identity and service. Deny beats allow; the deciding rule is named.
//!
//! Must not know how an identity was proved.

use crate::{
    id::{ServiceName, SpiffeId},
    owners::Owners,
};

/// All rules, and what holds where no rule matches.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Policy {
    pub default: Effect,
    pub rules: Vec<Rule>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Effect {
    Allow,
    Deny,
}

/// One rule.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rule {
    pub name: String,
    pub effect: Effect,
    /// Sources; a trailing `*` matches any rest. Empty: every identity.
    pub from: Vec<String>,
    /// Services; empty: every service.
    pub to: Vec<ServiceName>,
}

/// What was decided, by which rule (`None`: the default), and about which names of a service besides the one called.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Verdict<'a> {
    pub effect: Effect,
    pub rule: Option<&'a Rule>,
    pub behind: &'a [ServiceName],
}

impl Default for Policy {
    fn default() -> Self {
        Self { default: Effect::Allow, rules: Vec::new() }
    }
}

impl Policy {
    /// Decides whether `source` may call `service`, which no other service is behind.
    pub fn decide(&self, source: &SpiffeId, service: &ServiceName) -> Verdict<'_> {
        self.decide_by(source, service, &[])
    }

    /// Decides whether `source` may call the name `service`, which leads to the endpoints of `owners`.
    ///
    /// Rules that name one of an owner's names hold for it under each of them: a deny of either denies, an allow of either
    /// allows. Of several owners, each must be allowed.
    pub fn judge<'a>(&'a self, source: &SpiffeId, service: &ServiceName, owners: Option<&'a Owners>) -> Verdict<'a> {
        let Some(owners) = owners else { return self.decide(source, service) };
        let mut verdict = Verdict { effect: self.default, rule: None, behind: &[] };
        for behind in owners.services() {
            verdict = self.decide_by(source, service, behind);
            if verdict.effect == Effect::Deny {
                break;
            }
        }
        verdict
    }

    fn decide_by<'a>(&'a self, source: &SpiffeId, service: &ServiceName, behind: &'a [ServiceName]) -> Verdict<'a> {
        let first = |effect| {
            self.rules
                .iter()
                .find(|rule| rule.effect == effect && rule.is_about(service, behind) && rule.is_from(source.as_str()))
        };
        match first(Effect::Deny).or_else(|| first(Effect::Allow)) {
            Some(rule) => Verdict { effect: rule.effect, rule: Some(rule), behind },
            None => Verdict { effect: self.default, rule: None, behind },
        }
    }

    /// Whether every conceivable source may call `service`, so that the kernel need not ask.
    pub fn admits_everybody(&self, service: &ServiceName) -> bool {
        self.opens(service, None)
    }

    /// The same of a name that leads to the endpoints of `owners`.
    pub fn opens(&self, service: &ServiceName, owners: Option<&Owners>) -> bool {
        match owners {
            None => self.opens_by(service, &[]),
            Some(owners) => owners.services().all(|behind| self.opens_by(service, behind)),
        }
    }

    fn opens_by(&self, service: &ServiceName, behind: &[ServiceName]) -> bool {
        let mut about = self.rules.iter().filter(|rule| rule.is_about(service, behind));
        match self.default {
            Effect::Allow => about.all(|rule| rule.effect == Effect::Allow),
            Effect::Deny => {
                let (mut nobody_denied, mut all_allowed) = (true, false);
                for rule in about {
                    match rule.effect {
                        Effect::Deny => nobody_denied = false,
                        Effect::Allow => all_allowed |= rule.from.is_empty(),
                    }
                }
                nobody_denied && all_allowed
            }
        }
    }
}

impl Rule {
    /// Whether it names the service, or one of the names `behind` it.
    fn is_about(&self, service: &ServiceName, behind: &[ServiceName]) -> bool {
        self.to.is_empty() || self.to.contains(service) || behind.iter().any(|name| self.to.contains(name))
    }

    fn is_from(&self, source: &str) -> bool {
        let matches = |pattern: &String| match pattern.strip_suffix('*') {
            Some(start) => source.starts_with(start),
            None => source == pattern,
        };
        self.from.is_empty() || self.from.iter().any(matches)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::arb;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn deny_beats_allow(policy in arb::policy(), source in arb::spiffe_id(), service in arb::service_name()) {
            let denied = policy.rules.iter().any(|r| r.effect == Effect::Deny && r.is_about(&service, &[]) && r.is_from(source.as_str()));
            let verdict = policy.decide(&source, &service);
            if denied {
                prop_assert_eq!(verdict.effect, Effect::Deny);
            }
        }

        #[test]
        fn removing_an_allow_never_admits_anyone(
            policy in arb::policy(), n in any::<prop::sample::Index>(), source in arb::spiffe_id(), service in arb::service_name(),
        ) {
            let mut less = policy.clone();
            if !less.rules.is_empty() {
                let n = n.index(less.rules.len());
                if less.rules[n].effect == Effect::Allow {
                    less.rules.remove(n);
                }
            }
            if less.decide(&source, &service).effect == Effect::Allow {
                prop_assert_eq!(policy.decide(&source, &service).effect, Effect::Allow);
            }
        }

        #[test]
        fn the_named_rule_really_decides(policy in arb::policy(), source in arb::spiffe_id(), service in arb::service_name()) {
            let verdict = policy.decide(&source, &service);
            match verdict.rule {
                // Alone, it decides the same, whatever the default.
                Some(rule) => for default in [Effect::Allow, Effect::Deny] {
                    let alone = Policy { default, rules: vec![rule.clone()] };
                    prop_assert_eq!(alone.decide(&source, &service).effect, verdict.effect);
                },
                None => {
                    prop_assert_eq!(verdict.effect, policy.default);
                    prop_assert!(!policy.rules.iter().any(|r| r.is_about(&service, &[]) && r.is_from(source.as_str())));
                }
            }
        }

        #[test]
        fn who_admits_everybody_admits_each(policy in arb::policy(), source in arb::spiffe_id(), service in arb::service_name()) {
            if policy.admits_everybody(&service) {
                prop_assert_eq!(policy.decide(&source, &service).effect, Effect::Allow);
            }
        }
    }

    #[test]
    fn a_star_matches_any_rest_and_nothing_else_does() {
        let rule =
            |from: &str| Rule { name: "r".into(), effect: Effect::Deny, from: vec![from.into()], to: Vec::new() };
        for (from, source, expected) in [
            ("spiffe://a/ns/x/*", "spiffe://a/ns/x/sa/y", true),
            ("spiffe://a/ns/x/*", "spiffe://a/ns/xx/sa/y", false),
            ("spiffe://a/ns/x", "spiffe://a/ns/x", true),
            ("spiffe://a/ns/x", "spiffe://a/ns/x/y", false),
        ] {
            assert_eq!(rule(from).is_from(source), expected, "{from} {source}");
        }
    }

    #[test]
    fn nobody_is_asked_about_an_open_service() {
        let (web, cache) = ("web".parse().expect("valid"), "cache".parse().expect("valid"));
        let rule = Rule { name: "r".into(), effect: Effect::Deny, from: vec!["spiffe://a/x".into()], to: vec![cache] };
        let policy = Policy { default: Effect::Allow, rules: vec![rule.clone()] };
        assert!(policy.admits_everybody(&web) && !policy.admits_everybody(&rule.to[0]));
        let closed = Policy { default: Effect::Deny, rules: Vec::new() };
        assert!(!closed.admits_everybody(&web));
        let all = Rule { effect: Effect::Allow, from: Vec::new(), to: vec![web.clone()], ..rule };
        assert!(Policy { rules: vec![all], ..closed }.admits_everybody(&web));
    }
}
