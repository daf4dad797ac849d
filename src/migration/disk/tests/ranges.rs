//! Ranges of parcels as one: what is alike costs one hash for many, what is not is found in it.

use std::path::Path;
use std::time::{Duration, SystemTime};

use super::*;

const PARCEL: usize = blocks::PARCEL_BYTES as usize;
const PARCELS: usize = 20;

/// A block of data in each parcel, zeros otherwise.
fn image() -> Vec<u8> {
    let mut data = vec![0; PARCELS * PARCEL];
    for (parcel, noise) in noise(1, PARCELS * BLOCK_BYTES).chunks(BLOCK_BYTES).enumerate() {
        data[parcel * PARCEL..][..BLOCK_BYTES].copy_from_slice(noise);
    }
    data
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_alike_is_asked_about_as_one() {
    let data = image();
    let ends = ends().await;
    fs::write(ends.image(), &data).unwrap();
    let (ends, round) = ends.send(&Guest::new(&data), How::Offer, Vec::new(), false).await;
    // The end, one parcel, and while its answer is on its way as many as fit at once; the rest as one.
    assert_eq!((round.sent, round.read), (0, data.len()));
    assert!(round.items <= 8, "{} items", round.items);

    let mut other = data.clone();
    other[15 * PARCEL + 5] ^= 1;
    let (ends, round) =
        ends_in(ends.dir).await.send(&Guest::new(&other), How::Offer, Vec::new(), false).await;
    assert!(ends.has() == other, "the image is another");
    // The parcels of one range, the pieces of one, its blocks, and what it lacks.
    assert!(round.items <= 8 + 4, "{} items", round.items);
    // No parcel is read twice to be compared.
    assert!(round.read < data.len() + PARCEL, "{} bytes", round.read);
    assert!(round.written <= BLOCK_BYTES as u64);
}

#[tokio::test(flavor = "multi_thread")]
async fn of_recorded_images_only_what_differs_is_read() {
    let data = image();
    let ends = ends().await;
    let path = ends.dir.path().join("source.raw");
    fs::write(&path, &data).unwrap();
    let file = File::options().write(true).open(&path).unwrap();
    file.set_modified(SystemTime::now() - Duration::from_secs(3600)).unwrap();
    let guest = Guest::new(&data);
    let push = async |ends: Ends, path: &Path| {
        guest.reads.store(0, Ordering::Relaxed);
        let record = ImageRecord::at_rest(vec![Some(path.to_path_buf())]);
        record.begin(&[guest.info.bytes], true);
        ends.send_recorded(&guest, How::Offer, Vec::new(), false, record).await
    };
    let (ends, _) = push(ends, &path).await;
    let (ends, round) = push(ends_in(ends.dir).await, &path).await;
    assert_eq!((round.items, guest.reads.load(Ordering::Relaxed)), (3, 0));

    let mut other = data.clone();
    other[15 * PARCEL + 5] ^= 1;
    fs::write(ends.image(), &other).unwrap();
    let (ends, round) = push(ends_in(ends.dir).await, &path).await;
    assert!(ends.has() == data, "the image is another");
    assert_eq!(guest.reads.load(Ordering::Relaxed), 32);
    assert!(round.read < data.len() + 2 * PARCEL, "{} bytes", round.read);
    assert!(round.sent <= BLOCK_BYTES as u64);
}
