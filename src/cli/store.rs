//! `store gc`: what lies in the pools and is of no use any more.
//!
//! Invariant: nothing is removed without `--go`, and what is removed was shown by the same command without it.

use super::args::{GcArgs, Global, StoreCommand};
use super::table::Table;
use super::{CommandError, Exit, ask, print};
use crate::control::{GarbageKind, GcRequest, GcSummary, Reply, Request};
use crate::units::{ByteCount, duration_text};

pub(super) async fn run(global: &Global, command: StoreCommand) -> Result<Exit, CommandError> {
    let StoreCommand::Gc(GcArgs { older, go }) = command;
    let request = Request::StoreGc(GcRequest { older_s: older.as_secs(), go });
    let Reply::Garbage(summary) = ask(global, &request).await? else {
        return Err(CommandError::Mismatch);
    };
    let stays = summary.garbage.iter().any(|one| one.stays.is_some());
    print(global, &summary, text);
    Ok(if stays { Exit::Failed } else { Exit::Done })
}

fn text(summary: &GcSummary) -> String {
    if summary.garbage.is_empty() {
        return "Nothing of that age is of no use.\n".to_owned();
    }
    let mut table = Table::new(&["FILE", ">ON DISK", ">AGE", "WHAT"]);
    for one in &summary.garbage {
        let what = match one.kind {
            GarbageKind::Unfinished => "an image that has not arrived whole",
            GarbageKind::Orphan => "the record of an image that is gone",
        };
        let stays = one.stays.as_ref().map(|why| format!("; it stays: {why}"));
        table.row([
            one.path.clone(),
            ByteCount(one.bytes).to_string(),
            duration_text(one.age_s * 1000),
            format!("{what}{}", stays.unwrap_or_default()),
        ]);
    }
    let bytes = ByteCount(summary.bytes);
    let end = match summary.removed {
        true => format!("{bytes} given back\n"),
        false => format!("{bytes} could be given back: --go does it\n"),
    };
    table.render("") + &end
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::control::Garbage;

    #[test]
    fn what_would_go_is_shown_with_its_reason() {
        let one = Garbage {
            path: "/images/b.raw.longhaul-part".into(),
            kind: GarbageKind::Unfinished,
            bytes: 3 << 30,
            age_s: 9 * 86_400,
            stays: None,
        };
        let mut summary = GcSummary { garbage: vec![one], bytes: 3 << 30, removed: false };
        assert_eq!(
            text(&summary),
            "FILE                         ON DISK      AGE  WHAT\n\
             /images/b.raw.longhaul-part  3.0 GiB  9 d 0 h  an image that has not arrived whole\n\
             3.0 GiB could be given back: --go does it\n"
        );
        summary.garbage[0].stays = Some("read-only".into());
        summary.removed = true;
        assert!(text(&summary).contains("; it stays: read-only"));
    }
}
