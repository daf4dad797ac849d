//! `vm`: the VMs of this host.
//!
//! Invariant: a description is read here, with the rights of whoever runs the command, and judged by
//! the agent.

use std::path::Path;

use super::args::{Global, VmCommand};
use super::table::Table;
use super::{CommandError, Exit, ask, ask_and_say, print};
use crate::control::{
    Adopted, Checked, Failure, LINE_BYTES_MAX, Reply, Request, VmDetail, VmSource, VmSummary,
};
use crate::units::ByteCount;

pub(super) async fn run(global: &Global, command: VmCommand) -> Result<Exit, CommandError> {
    match command {
        VmCommand::Start { subject } => {
            ask_and_say(global, &Request::VmStart(source(subject)?)).await
        }
        VmCommand::Forget(args) => ask_and_say(global, &Request::VmForget { vm: args.vm }).await,
        VmCommand::Stop { vm, force } => ask_and_say(global, &Request::VmStop { vm, force }).await,
        VmCommand::List => {
            let Reply::Vms(vms) = ask(global, &Request::VmList).await? else {
                return Err(CommandError::Mismatch);
            };
            print(global, &vms, |vms| vms_text(vms));
            Ok(Exit::Done)
        }
        VmCommand::Show(args) => {
            let Reply::Vm(vm) = ask(global, &Request::VmShow { vm: args.vm }).await? else {
                return Err(CommandError::Mismatch);
            };
            print(global, &vm, detail_text);
            Ok(Exit::Done)
        }
        VmCommand::Adopt { qmp, name } => {
            let qmp = std::path::absolute(&qmp).unwrap_or(qmp).display().to_string();
            let Reply::Adopted(adopted) = ask(global, &Request::VmAdopt { qmp, name }).await?
            else {
                return Err(CommandError::Mismatch);
            };
            print(global, &adopted, adopted_text);
            Ok(Exit::Done)
        }
        VmCommand::Check { subject, to } => {
            let vm = source(subject)?;
            let Reply::Checked(checked) = ask(global, &Request::VmCheck { vm, to }).await? else {
                return Err(CommandError::Mismatch);
            };
            print(global, &checked, checked_text);
            Ok(if checked.obstacles.is_empty() { Exit::Done } else { Exit::Failed })
        }
    }
}

/// A name never has a `/` in it, and a description's file usually ends in `.toml`.
fn source(subject: String) -> Result<VmSource, Failure> {
    match subject.contains('/') || subject.ends_with(".toml") {
        true => description(Path::new(&subject)),
        false => Ok(VmSource::Name(subject)),
    }
}

fn description(file: &Path) -> Result<VmSource, Failure> {
    let origin = file.display().to_string();
    let refused = |why: String| Failure::refused(why, "`longhaul vm show NAME` prints an example");
    let unreadable = |error| refused(format!("cannot read {origin}: {error}"));
    let size = std::fs::metadata(file).map_err(unreadable)?.len();
    // Escaping can make a text longer: half a line is far more than any description needs.
    if size > LINE_BYTES_MAX as u64 / 2 {
        return Err(refused(format!("{origin} is too large for a description")));
    }
    let text = std::fs::read_to_string(file).map_err(unreadable)?;
    Ok(VmSource::Description { origin, text })
}

pub(super) fn vms_text(vms: &[VmSummary]) -> String {
    if vms.is_empty() {
        return "No VMs yet: `longhaul vm start FILE` or `longhaul vm adopt`.\n".to_owned();
    }
    let mut table = Table::new(&["VM", "STATE", ">MEMORY", ">CPUS", ">DISKS", "STARTED BY"]);
    for vm in vms {
        table.row([
            vm.name.clone(),
            vm.state.clone(),
            ByteCount(vm.memory_bytes).to_string(),
            vm.cpus.to_string(),
            vm.disks.to_string(),
            if vm.adopted { "others (adopted)" } else { "longhaul" }.to_owned(),
        ]);
    }
    table.render("")
}

fn detail_text(vm: &VmDetail) -> String {
    let qmp = vm.qmp.as_deref().unwrap_or("-");
    let state = &vm.summary.state;
    format!("# state: {state}\n# QMP:   {qmp}\n\n{}", vm.description)
}

fn adopted_text(adopted: &Adopted) -> String {
    let Adopted { vm, file, not_understood, notes } = adopted;
    let mut text = format!("{vm} is adopted; its description is {file}\n");
    for note in notes {
        text += &format!("  note: {note}\n");
    }
    if not_understood.is_empty() {
        return text;
    }
    text += "Not understood, so it cannot be built again at another host as it is:\n";
    for thing in not_understood {
        text += &format!("  {thing}\n");
    }
    text
}

fn checked_text(checked: &Checked) -> String {
    let Checked { vm, to, obstacles } = checked;
    let what = match to {
        Some(peer) => format!("move to {peer}"),
        None => "run at this host".to_owned(),
    };
    if obstacles.is_empty() {
        return format!("{vm} can {what}.\n");
    }
    let list: String = obstacles.iter().map(|obstacle| format!("  {obstacle}\n")).collect();
    format!("{vm} cannot {what}:\n{list}")
}
