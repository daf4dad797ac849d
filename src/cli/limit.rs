//! `limit`: how fast may be sent, now and next.
//!
//! Invariant: what is shown is what the agent says that holds, also right after a change.

use super::args::{Global, LimitArgs};
use super::table::Table;
use super::{CommandError, Exit, ask, print};
use crate::calendar::cap_text;
use crate::control::{JobLimits, Limit, LimitRequest, Limits, Reply, Request};

pub(super) async fn run(global: &Global, args: LimitArgs) -> Result<Exit, CommandError> {
    let LimitArgs { vm, rate, class } = args;
    let shown = vm.clone().filter(|_| rate.is_none() && class.is_empty());
    let wish = LimitRequest { vm, rate, classes: class.into_iter().collect() };
    let Reply::Limits(mut limits) = ask(global, &Request::Limit(wish)).await? else {
        return Err(CommandError::Mismatch);
    };
    if let Some(vm) = shown {
        limits.jobs.retain(|job| job.vm == vm);
    }
    print(global, &limits, |limits| text(limits));
    Ok(Exit::Done)
}

fn text(limits: &Limits) -> String {
    let mut table = Table::new(&["WHAT", "NOW", "NEXT", "AS SET"]);
    let mut row = |what: String, limit: &Limit| {
        let set = limit.next.as_ref().map_or_else(String::new, |_| limit.set.to_string());
        table.row([what, cap_text(limit.now), next(limit), set]);
    };
    row("this host".to_owned(), &limits.agent);
    for job in &limits.jobs {
        row(job.vm.clone(), &job.rate);
        for (class, limit) in &job.classes {
            row(format!("{} {class}", job.vm), limit);
        }
    }
    let mut text = table.render("");
    if limits.agent.next.is_some() || limits.jobs.iter().any(follows_the_clock) {
        text += &format!("Clock: {}\n", limits.time_zone);
    }
    if let Some(configured) = &limits.configured {
        text += &format!(
            "This host's cap was set by a command and lasts until the agent is restarted; its \
             configuration says {configured}.\n"
        );
    }
    text
}

fn follows_the_clock(job: &JobLimits) -> bool {
    job.rate.next.is_some() || job.classes.values().any(|limit| limit.next.is_some())
}

fn next(limit: &Limit) -> String {
    let change = limit.next.as_ref();
    change.map_or_else(String::new, |next| format!("{} from {}", cap_text(next.rate), next.clock))
}

/// A job's caps in a few characters: `20M`, `20M until Mon 20:00`, `unlimited, seed 5M`.
pub(super) fn short(limits: &JobLimits) -> String {
    let words = |limit: &Limit| match &limit.next {
        Some(next) => format!("{} until {}", cap_text(limit.now), next.clock),
        None => cap_text(limit.now),
    };
    let classes = limits.classes.iter().map(|(class, limit)| format!(", {class} {}", words(limit)));
    words(&limits.rate) + &classes.collect::<String>()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::control::LimitChange;

    fn limit(now: &str) -> Limit {
        Limit { set: now.parse().unwrap(), now: now.parse().ok(), next: None }
    }

    #[test]
    fn what_holds_and_what_comes_stand_side_by_side() {
        let until_evening = Limit {
            set: "08:00-20:00=20M, else=unlimited".parse().unwrap(),
            now: "20M".parse().ok(),
            next: Some(LimitChange {
                at: "2026-08-03T18:00:00Z".parse().unwrap(),
                clock: "Mon 20:00".into(),
                rate: None,
            }),
        };
        let job = JobLimits {
            vm: "db1".into(),
            rate: limit("unlimited"),
            classes: [("seed".into(), limit("5M"))].into(),
        };
        assert_eq!(short(&job), "unlimited, seed 5M");
        let mut limits = Limits {
            time_zone: "Europe/Paris".into(),
            agent: until_evening,
            configured: "100M".parse().ok(),
            jobs: vec![job],
        };
        assert_eq!(
            text(&limits),
            "WHAT       NOW        NEXT                      AS SET\n\
             this host  20M        unlimited from Mon 20:00  08:00-20:00=20M, else=unlimited\n\
             db1        unlimited\n\
             db1 seed   5M\n\
             Clock: Europe/Paris\n\
             This host's cap was set by a command and lasts until the agent is restarted; its \
             configuration says 100M.\n"
        );
        limits = Limits { agent: limit("20M"), configured: None, jobs: vec![], ..limits };
        assert_eq!(text(&limits), "WHAT       NOW  NEXT  AS SET\nthis host  20M\n");
    }
}
