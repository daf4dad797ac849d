//! `verify`: whether an image still holds what was recorded of it.
//!
//! Invariant: damage is a failure; what somebody wrote since is none.

use super::args::{Global, VerifyArgs};
use super::{CommandError, Exit, print, work};
use crate::control::{Reply, Request, Response, VerifySummary};
use crate::units::ByteCount;

pub(super) async fn run(global: &Global, args: VerifyArgs) -> Result<Exit, CommandError> {
    let image = std::path::absolute(&args.image).unwrap_or(args.image);
    let request = Request::Verify { image: image.display().to_string() };
    let summary = match work(global, &request).await? {
        Response::Done(Reply::Verified(summary)) => summary,
        Response::Done(_) => return Err(CommandError::Mismatch),
        Response::Failed(failure) => return Err(failure.into()),
    };
    print(global, &*summary, text);
    let is_damaged = summary.untouched && summary.differing_bytes > 0;
    Ok(if is_damaged { Exit::Failed } else { Exit::Done })
}

fn text(summary: &VerifySummary) -> String {
    let VerifySummary { image, recorded_bytes, untouched, differing_bytes, differing, .. } =
        summary;
    let recorded = ByteCount(*recorded_bytes);
    if *differing_bytes == 0 {
        return format!("{image}: all {recorded} that are recorded are as they should be\n");
    }
    let differs = ByteCount(*differing_bytes);
    let mut text = match untouched {
        true => format!(
            "{image}: DAMAGED: {differs} of {recorded} are not what was written, and nobody wrote to it \
             since\n"
        ),
        false => {
            format!("{image}: {differs} of {recorded} were written to since, or are damaged\n")
        }
    };
    for (first, len) in differing {
        text += &format!("  {len} bytes from byte {first}\n");
    }
    let named: u64 = differing.iter().map(|(_, len)| len).sum();
    if named < *differing_bytes {
        text += &format!("  and {} more\n", ByteCount(differing_bytes - named));
    }
    if *untouched {
        text += "Its record is no longer believed. Push it again with --replace from where it is whole:\n\
                 only what is damaged is sent.\n";
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn damage_is_told_from_what_was_written() {
        let mut summary = VerifySummary {
            image: "/images/a.raw".into(),
            bytes: 4 << 30,
            recorded_bytes: 1 << 30,
            untouched: true,
            differing_bytes: 0,
            differing: Vec::new(),
        };
        assert!(text(&summary).contains("all 1.0 GiB"));
        summary.differing_bytes = 3 << 16;
        summary.differing = vec![(4096, 1 << 16)];
        assert!(text(&summary).contains("DAMAGED: 192.0 KiB of 1.0 GiB"), "{}", text(&summary));
        assert!(text(&summary).contains("and 128.0 KiB more"));
        summary.untouched = false;
        assert!(!text(&summary).contains("DAMAGED"));
    }
}
