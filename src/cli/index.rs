//! `index`: what the images here hold, for disks that arrive.
//!
//! Invariant: what is shown is what the agent says; leaving the command does not end the agent's work.

use super::args::{Global, IndexArgs, IndexCommand};
use super::table::Table;
use super::{CommandError, Exit, print, work};
use crate::control::{
    IndexRequest, IndexSummary, IndexWork, IndexedState, Reply, Request, Response,
};
use crate::units::ByteCount;

pub(super) async fn run(global: &Global, args: IndexArgs) -> Result<Exit, CommandError> {
    let request = match args.command {
        None => IndexRequest::Show,
        Some(IndexCommand::Build { subjects }) => IndexRequest::Build { subjects },
        Some(IndexCommand::Check) => IndexRequest::Check,
    };
    let summary = match work(global, &Request::Index(request)).await? {
        Response::Done(Reply::Index(summary)) => summary,
        Response::Done(_) => return Err(CommandError::Mismatch),
        Response::Failed(failure) => return Err(failure.into()),
    };
    let failed = summary.work.as_ref().is_some_and(|work| !work.failed.is_empty());
    print(global, &summary, |summary| text(summary));
    Ok(if failed { Exit::Failed } else { Exit::Done })
}

fn text(summary: &IndexSummary) -> String {
    let mut text = summary.work.as_ref().map(work_text).unwrap_or_default();
    if summary.images.is_empty() {
        return text + "No images: `longhaul index build` takes them in.\n";
    }
    let mut table = Table::new(&["IMAGE", ">SIZE", ">ENTRIES", "FROM", "STATE"]);
    for image in &summary.images {
        let state = match image.state {
            IndexedState::Current => "current",
            IndexedState::Changed => "changed since",
            IndexedState::Gone => "gone",
            IndexedState::Partial => "partial: `longhaul index build` reads it again",
        };
        let from = if image.was_read { "reading" } else { "its record" };
        table.row([
            image.path.clone(),
            ByteCount(image.bytes).to_string(),
            image.entries.to_string(),
            from.to_owned(),
            state.to_owned(),
        ]);
    }
    text += &table.render("");
    text += &format!(
        "{} entries, {} stale; {} in {} files, {} of memory\n",
        summary.entries,
        summary.stale_entries,
        ByteCount(summary.file_bytes),
        summary.runs,
        ByteCount(summary.memory_bytes),
    );
    if summary.damaged_runs > 0 {
        text += "Damage was met: `longhaul index check` leaves it out.\n";
    }
    text
}

fn work_text(work: &IndexWork) -> String {
    let mut parts = Vec::new();
    if work.images_read > 0 {
        parts.push(format!("{} images read ({})", work.images_read, ByteCount(work.bytes_read)));
    }
    for (count, what) in [
        (work.records_taken, "taken in by their records"),
        (work.unchanged, "as they were"),
        (work.dropped, "gone and dropped"),
        (work.damaged_pages, "damaged pages of the index left out"),
    ] {
        if count > 0 {
            parts.push(format!("{count} {what}"));
        }
    }
    let mut text = if parts.is_empty() { "nothing to do".to_owned() } else { parts.join(", ") };
    text.push('\n');
    for failed in &work.failed {
        text += &format!("not read: {failed}\n");
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::control::IndexedImage;

    #[test]
    fn what_was_done_stands_above_what_there_is() {
        let image = IndexedImage {
            path: "/images/a.raw".into(),
            bytes: 4 << 30,
            entries: 123_456,
            state: IndexedState::Changed,
            was_read: true,
        };
        let work =
            IndexWork { images_read: 1, bytes_read: 1 << 30, dropped: 2, ..Default::default() };
        let mut summary = IndexSummary {
            images: vec![image],
            entries: 123_456,
            stale_entries: 123_456,
            runs: 1,
            damaged_runs: 0,
            file_bytes: 2 << 20,
            memory_bytes: 4096,
            work: Some(work),
        };
        assert_eq!(
            text(&summary),
            "1 images read (1.0 GiB), 2 gone and dropped\n\
             IMAGE             SIZE  ENTRIES  FROM     STATE\n\
             /images/a.raw  4.0 GiB   123456  reading  changed since\n\
             123456 entries, 123456 stale; 2.0 MiB in 1 files, 4.0 KiB of memory\n"
        );
        summary.images.clear();
        summary.work = Some(IndexWork::default());
        assert!(text(&summary).starts_with("nothing to do\nNo images"));
    }
}
