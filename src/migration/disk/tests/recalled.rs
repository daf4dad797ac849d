//! Images at rest: compared by their record, without being read.

use std::path::Path;
use std::time::{Duration, SystemTime};

use super::*;

/// Reads of 512 KiB in a parcel.
const PARCEL_READS: usize = 32;

/// An image at the source that was last written to an hour before `now`.
fn image(ends: &Ends, data: &[u8], now: SystemTime) -> PathBuf {
    let path = ends.dir.path().join("source.raw");
    fs::write(&path, data).unwrap();
    let file = File::options().write(true).open(&path).unwrap();
    file.set_modified(now - Duration::from_secs(3600)).unwrap();
    path
}

/// Pushes the image; says how often it was read.
async fn push(ends: Ends, guest: &Guest, path: &Path) -> (Ends, Round, usize) {
    guest.reads.store(0, Ordering::Relaxed);
    let record = ImageRecord::at_rest(vec![Some(path.to_path_buf())]);
    record.begin(&[guest.info.bytes], true);
    let (ends, round) = ends.send_recorded(guest, How::Offer, Vec::new(), false, record).await;
    assert!(ends.has() == *guest.data.lock().unwrap(), "the image is another");
    (ends, round, guest.reads.load(Ordering::Relaxed))
}

#[tokio::test(flavor = "multi_thread")]
async fn what_was_recorded_whole_is_not_read_again() {
    let ends = ends().await;
    let data = [noise(1, 20 * MIB), vec![0; 40 * MIB], noise(2, 3 * MIB + 512)].concat();
    let now = SystemTime::now();
    let path = image(&ends, &data, now);
    let guest = Guest::new(&data);
    let (ends, round, reads) = push(ends, &guest, &path).await;
    assert!(reads > 0 && round.sent > 0);
    let (ends, round, reads) = push(ends_in(ends.dir).await, &guest, &path).await;
    assert_eq!((reads, round.sent, round.known), (0, 0, 23 * MIB as u64 + 512));
    assert!(round.wire < 32 << 10, "{} bytes on the wire", round.wire);

    // The target's is another now: only what differs is read.
    let mut other = data.clone();
    other[17 * MIB] ^= 1;
    fs::write(ends.image(), &other).unwrap();
    let (ends, round, reads) = push(ends_in(ends.dir).await, &guest, &path).await;
    assert!(reads > 0 && reads <= PARCEL_READS, "{reads} reads");
    assert!(round.sent < 4096, "{} bytes", round.sent);

    // And the record still holds.
    let (ends, _, reads) = push(ends_in(ends.dir).await, &guest, &path).await;
    assert_eq!(reads, 0);

    // The image was written to: all of it is read.
    guest.data.lock().unwrap()[5 * MIB] ^= 1;
    let path = image(&ends, &guest.data.lock().unwrap(), now + Duration::from_secs(60));
    let (ends, _, reads) = push(ends_in(ends.dir).await, &guest, &path).await;
    assert!(reads > PARCEL_READS, "{reads} reads");

    // A target that has nothing.
    fs::remove_file(ends.image()).unwrap();
    let (_, round, _) = push(ends_in(ends.dir).await, &guest, &path).await;
    assert_eq!(round.sent, 23 * MIB as u64 + 512);
}

/// A disk in use is read, whatever its record says; so is one that was written to just now.
#[tokio::test(flavor = "multi_thread")]
async fn what_may_be_written_to_is_read() {
    let ends = ends().await;
    let data = noise(1, 3 * MIB);
    let path = image(&ends, &data, SystemTime::now());
    let guest = Guest::new(&data);
    let (ends, ..) = push(ends, &guest, &path).await;
    let record = ImageRecord::new(vec![Some(path.to_path_buf())]);
    record.begin(&[guest.info.bytes], true);
    guest.reads.store(0, Ordering::Relaxed);
    let ends = ends_in(ends.dir).await;
    let (ends, _) = ends.send_recorded(&guest, How::Offer, Vec::new(), false, record).await;
    assert!(guest.reads.load(Ordering::Relaxed) > 0);

    File::options().write(true).open(&path).unwrap().set_modified(SystemTime::now()).unwrap();
    let (ends, ..) = push(ends_in(ends.dir).await, &guest, &path).await;
    let (_, _, reads) = push(ends_in(ends.dir).await, &guest, &path).await;
    assert!(reads > 0);
}
