//! `pair`: who am I, whom do I trust.
//!
//! Invariant: nobody is trusted without a fingerprint that a person has typed, or has seen and said
//! yes to.

use super::args::{Global, PairArgs};
use super::table::Table;
use super::{CommandError, Exit, ask, ask_and_say, confirm, print};
use crate::control::{Failure, OwnIdentity, PeerSummary, Reply, Request};

pub(super) async fn run(global: &Global, args: PairArgs) -> Result<Exit, CommandError> {
    if args.list {
        let Reply::Peers(peers) = ask(global, &Request::PairList).await? else {
            return Err(CommandError::Mismatch);
        };
        print(global, &peers, |peers| peers_text(peers));
        return Ok(Exit::Done);
    }
    if let Some(name) = args.remove {
        return ask_and_say(global, &Request::PairRemove { name }).await;
    }
    let (Some(name), Some(address)) = (args.name, args.address) else {
        let Reply::Identity(identity) = ask(global, &Request::Whoami).await? else {
            return Err(CommandError::Mismatch);
        };
        print(global, &identity, identity_text);
        return Ok(Exit::Done);
    };
    let (address, fingerprint) = match args.fingerprint {
        Some(fingerprint) => (address, fingerprint),
        None => match seen_and_agreed(global, &name, address).await? {
            Some(agreed) => agreed,
            None => {
                eprintln!("Nothing was changed.");
                return Ok(Exit::Cancelled);
            }
        },
    };
    ask_and_say(global, &Request::PairAdd { name, address, fingerprint }).await
}

/// Shows who answers at `address` and asks whether that is the right one.
async fn seen_and_agreed(
    global: &Global,
    name: &str,
    address: String,
) -> Result<Option<(String, String)>, CommandError> {
    let Reply::Probed { address, fingerprint } = ask(global, &Request::Probe { address }).await?
    else {
        return Err(CommandError::Mismatch);
    };
    let question = format!(
        "{address} says that it is\n  {fingerprint}\n\
         Does `longhaul pair` on {name} show exactly this?"
    );
    match confirm(&question) {
        Some(true) => Ok(Some((address, fingerprint))),
        Some(false) => Ok(None),
        None => Err(Failure::refused(
            format!("{address} says that it is {fingerprint}, and nobody is here to confirm it"),
            format!(
                "compare it with what `longhaul pair` on {name} shows, then \
                 `longhaul pair {name} {address} {fingerprint}`"
            ),
        )
        .into()),
    }
}

pub(super) fn peers_text(peers: &[PeerSummary]) -> String {
    if peers.is_empty() {
        return "No peers yet: run `longhaul pair` on the other host and type here what it shows.\n"
            .to_owned();
    }
    let mut table = Table::new(&["PEER", "ADDRESS", "FINGERPRINT"]);
    for peer in peers {
        table.row([peer.name.clone(), peer.address.clone(), peer.fingerprint.clone()]);
    }
    table.render("")
}

fn identity_text(identity: &OwnIdentity) -> String {
    let OwnIdentity { name, fingerprint, listen, reachable } = identity;
    let address = reachable.as_deref().unwrap_or("ADDRESS");
    format!(
        "name         {name}\n\
         fingerprint  {fingerprint}\n\
         listens on   {listen} (UDP)\n\
         \n\
         To let another host trust this one, type there (with the address that it reaches this host \
         at):\n  longhaul pair {name} {address} {fingerprint}\n"
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_for_the_other_host_is_shown_whole() {
        let identity = OwnIdentity {
            name: "paris".into(),
            fingerprint: "LH-0000".into(),
            listen: "0.0.0.0:4873".into(),
            reachable: Some("192.0.2.1:4873".into()),
        };
        let text = identity_text(&identity);
        assert!(text.contains("\n  longhaul pair paris 192.0.2.1:4873 LH-0000\n"), "{text}");
    }
}
