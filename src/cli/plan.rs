//! `plan`, `drain` and `evacuate`: what the planner sees, plans, and does.
//!
//! Invariant: a plan is only shown unless `--go` is typed. A recorded plan is made anew here, from its
//! record alone, and compared to the last bit.

use std::fs::File;
use std::io::{BufRead, BufReader};
use std::path::Path;

use longhaul_scheduler::decision::Decision;

use super::args::{DrainArgs, EvacuateArgs, Global, PlanArgs};
use super::table::Table;
use super::{CommandError, Exit, ask, print, print_json};
use crate::control::{
    DrainRequest, EvacuateRequest, EvacuationView, Failure, HostView, OrderOutcome, OrderView,
    PlanRecord, PlanView, Reply, Request,
};
use crate::units::duration_text;

pub(super) async fn plan(global: &Global, args: PlanArgs) -> Result<Exit, CommandError> {
    if let Some(file) = args.replay {
        return replay(global, &file);
    }
    let view = asked(global, &Request::Plan).await?;
    print(global, &view, |view| {
        let mut text = plan_text(view);
        if args.explain {
            text += &explained(view);
        }
        text
    });
    Ok(Exit::Done)
}

pub(super) async fn drain(global: &Global, args: DrainArgs) -> Result<Exit, CommandError> {
    let DrainArgs { host, go, undo } = args;
    let wish = DrainRequest { host: host.clone(), go, undo };
    let view = asked(global, &Request::Drain(wish)).await?;
    print(global, &view, |view| {
        let mut text = plan_text(view);
        text += &match (go, undo) {
            (_, true) => format!("\n{host} takes VMs again.\n"),
            (true, _) => format!(
                "\n{host} is being emptied and takes no VM; `longhaul plan` shows how far it is.\n"
            ),
            _ => "\nNothing was changed: this is what --go would do.\n".to_owned(),
        };
        text
    });
    Ok(Exit::Done)
}

pub(super) async fn evacuate(global: &Global, args: EvacuateArgs) -> Result<Exit, CommandError> {
    let EvacuateArgs { site, to, deadline, go, stop } = args;
    let to = to.unwrap_or_default();
    let deadline_s = deadline.map_or(0, |deadline| deadline.as_secs());
    let wish = EvacuateRequest { site: site.clone(), to, deadline_s, go, stop };
    let view = asked(global, &Request::Evacuate(wish)).await?;
    print(global, &view, |view| {
        let mut text = view.evacuation.as_ref().map(evacuation_text).unwrap_or_default();
        text += &match (go, stop) {
            (_, true) => format!("The evacuation of {site} is ended; what moves, moves on.\n"),
            (true, _) => "It has begun; `longhaul plan` shows how far it is.\n".to_owned(),
            _ => "Nothing was changed: this is what --go would do.\n".to_owned(),
        };
        text
    });
    Ok(Exit::Done)
}

async fn asked(global: &Global, request: &Request) -> Result<Box<PlanView>, CommandError> {
    match ask(global, request).await? {
        Reply::Plan(view) => Ok(view),
        _ => Err(CommandError::Mismatch),
    }
}

fn plan_text(view: &PlanView) -> String {
    let mut text = hosts_text(&view.hosts);
    for host in &view.hosts {
        if let Some(trouble) = &host.trouble {
            text += &format!("{} could not be asked: {trouble}\n", host.name);
        }
    }
    text += "\nPLAN\n";
    match (&view.plan, &view.without) {
        (Some(plan), _) if plan.decisions.is_empty() => {
            text += "  nothing to do: no host is hot, and none is in maintenance\n";
        }
        (Some(plan), _) => {
            plan.decisions.iter().for_each(|decision| text += &format!("  {decision}\n"));
            let waits = !view.acts
                && plan
                    .moves()
                    .any(|one| one.because != longhaul_scheduler::decision::Why::Maintenance);
            if waits {
                text += "  (scheduler.act is not set: moves against hot hosts are only shown)\n";
            }
        }
        (None, Some(why)) => text += &format!("  none can be made: {why}\n"),
        (None, None) => text += "  none yet\n",
    }
    if let Some(evacuation) = &view.evacuation {
        text += "\n";
        text += &evacuation_text(evacuation);
    }
    if !view.orders.is_empty() {
        text += "\n";
        text += &orders_text(&view.orders);
    }
    text
}

fn hosts_text(hosts: &[HostView]) -> String {
    let mut table = Table::new(&["HOST", ">CPU", ">OF", ">MEMORY", ">OF", "STATE", "VMS"]);
    for host in hosts {
        let number = |value: Option<f64>| {
            value.map_or_else(|| "-".to_owned(), |value| format!("{value:.2}"))
        };
        let memory =
            |value: Option<u64>| value.map_or_else(|| "-".to_owned(), |mib| format!("{mib} MiB"));
        let state = match (&host.trouble, host.cpu, host.is_in_maintenance) {
            (_, _, true) => "maintenance",
            (Some(_), _, _) => "silent",
            (None, None, _) => "not heard yet",
            (None, Some(_), _) => "heard",
        };
        table.row([
            host.name.clone(),
            number(host.cpu.map(|(asked, _)| asked)),
            number(host.cpu.map(|(_, cores)| cores)),
            memory(host.memory_mib.map(|(used, _)| used)),
            memory(host.memory_mib.map(|(_, all)| all)),
            state.to_owned(),
            if host.vms.is_empty() { "-".to_owned() } else { host.vms.join(", ") },
        ]);
    }
    table.render("")
}

fn orders_text(orders: &[OrderView]) -> String {
    let mut table = Table::new(&["ORDERED", "VM", "FROM", "TO", "FORECAST", "CAME"]);
    for order in orders {
        let (mib, seconds) = order.forecast;
        table.row([
            order.at.strftime("%Y-%m-%d %H:%M:%SZ").to_string(),
            order.vm.clone(),
            order.from.clone(),
            order.to.clone(),
            format!("up to {mib} MiB, {seconds:.0} s"),
            came(&order.outcome),
        ]);
    }
    let mut text = table.render("");
    if let Some(newest) = orders.first() {
        text += &format!("the newest, because: {}\n", newest.because);
    }
    text
}

fn came(outcome: &OrderOutcome) -> String {
    match outcome {
        OrderOutcome::UnderWay => "under way".to_owned(),
        OrderOutcome::Done { wire_mib, took_s, downtime_ms } => {
            format!("{wire_mib} MiB, {took_s:.0} s, downtime {downtime_ms:.0} ms")
        }
        OrderOutcome::Failed { what } => format!("failed: {what}"),
        OrderOutcome::Lost => "nobody knows".to_owned(),
    }
}

fn evacuation_text(of: &EvacuationView) -> String {
    let EvacuationView { site, to, deadline, is_under_way, lines, .. } = of;
    let word = if *is_under_way { "EVACUATION" } else { "EVACUATION (a plan)" };
    let deadline = deadline.strftime("%Y-%m-%d %H:%M:%SZ");
    let mut text = format!("{word} of {site} to {to}, until {deadline}\n");
    lines.iter().for_each(|line| text += &format!("  {line}\n"));
    let list =
        |names: &[String]| if names.is_empty() { "none".to_owned() } else { names.join(", ") };
    text += &format!("promised: {}\n", list(&of.promised));
    text += &format!("left behind: {}\n", list(&of.left_behind));
    if *is_under_way {
        text += &format!("arrived: {}\n", list(&of.saved));
    }
    let mut before = 0.0;
    for (seconds, weight) in of.could_save.iter().filter(|(_, weight)| *weight > 0.0) {
        // Only where there is more.
        if *weight <= before {
            continue;
        }
        before = *weight;
        let after = duration_text(u64::try_from(*seconds).unwrap_or(0) * 1000);
        text += &format!("could save by {after}: weight {weight}\n");
    }
    text
}

/// The forecasts that the plan rests on.
fn explained(view: &PlanView) -> String {
    if view.forecasts.is_empty() {
        return "\nFORECASTS\n  no VM is known yet\n".to_owned();
    }
    let mut table = Table::new(&["VM", ">SOON", ">+-", ">LATER", ">+-", "BY"]);
    for (vm, forecast) in &view.forecasts {
        let number = |value: f64| format!("{value:.2}");
        let by = serde_json::to_value(forecast.predictor).ok();
        table.row([
            vm.clone(),
            number(forecast.soon.mean),
            number(forecast.soon.deviation),
            number(forecast.later.mean),
            number(forecast.later.deviation),
            by.as_ref().and_then(|by| by.as_str()).unwrap_or("-").to_owned(),
        ]);
    }
    format!(
        "\nFORECASTS, in cores: when a move would end, and over the hour after\n{}",
        table.render("")
    )
}

/// Makes recorded plans anew.
fn replay(global: &Global, file: &Path) -> Result<Exit, CommandError> {
    let refused = |what: String| {
        let next = "the planner's state folder has the records: plans.jsonl";
        CommandError::from(Failure::refused(what, next))
    };
    let unreadable = |error| refused(format!("cannot read {}: {error}", file.display()));
    let (mut same, mut other) = (0u64, Vec::new());
    for (number, line) in (1..).zip(BufReader::new(File::open(file).map_err(unreadable)?).lines()) {
        let line = line.map_err(unreadable)?;
        let record: PlanRecord = serde_json::from_str(&line).map_err(|error| {
            refused(format!("{}:{number} is no record of a plan: {error}", file.display()))
        })?;
        let PlanRecord { state, forecasts, policy, plan } = &record;
        let again = longhaul_scheduler::plan(state, forecasts, policy, plan.now_s, plan.seed);
        if again.as_ref() == Ok(plan) {
            same += 1;
        } else {
            let decisions = again.map(|again| again.decisions).unwrap_or_default();
            other.push((number, sentences(&decisions), sentences(&plan.decisions)));
        }
    }
    if global.json {
        let other: Vec<u64> = other.iter().map(|(number, ..)| *number).collect();
        print_json(&serde_json::json!({ "same": same, "other": other }));
    } else {
        println!("{same} plans come out the same to the last bit, {} do not", other.len());
        for (number, again, then) in &other {
            println!("line {number}: then {then}; now {again}");
        }
    }
    Ok(if other.is_empty() { Exit::Done } else { Exit::Failed })
}

fn sentences(decisions: &[Decision]) -> String {
    decisions.iter().map(Decision::to_string).collect::<Vec<_>>().join("; ")
}
