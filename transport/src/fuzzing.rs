//! The decoders of this crate, as fuzz targets call them; no part of an ordinary build.
//!
//! Invariant: what is checked here is true of any bytes.

#![allow(missing_docs, clippy::unwrap_used, reason = "the targets say what they are for")]

use bytes::BytesMut;

use crate::control::next_frame;
use crate::frame::{
    BATCH_HEAD, BatchHead, Hello, LENGTH_PREFIX, MAX_CONTROL_FRAME, MAX_RECEIPT, Receipt,
    decode_control,
};

pub fn greeting(body: &[u8]) {
    if let Ok(hello) = Hello::decode(body)
        && hello.protocol == crate::PROTOCOL_VERSION
    {
        let again = hello.encode();
        assert_eq!(Hello::decode(&again[LENGTH_PREFIX..]), Ok(hello));
    }
}

pub fn receipt(frame: &[u8]) {
    // Longer ones are refused by their length.
    if frame.len() <= MAX_RECEIPT
        && let Ok(receipt) = Receipt::decode(frame)
    {
        let again = receipt.encode();
        assert_eq!(Receipt::decode(&again[LENGTH_PREFIX..]), Ok(receipt));
    }
}

pub fn batch_head(bytes: &[u8]) {
    let Some(bytes) = bytes.first_chunk::<BATCH_HEAD>() else { return };
    if let Ok(head) = BatchHead::decode(*bytes) {
        assert_eq!(head.encode(), *bytes);
    }
}

pub fn control_stream(stream: &[u8], piece: usize) {
    let frames = |pieces: &mut dyn Iterator<Item = &[u8]>| {
        let (mut buffer, mut frames) = (BytesMut::new(), Vec::new());
        for piece in pieces {
            buffer.extend_from_slice(piece);
            loop {
                match next_frame(&mut buffer) {
                    Ok(Some(frame)) => frames.push(frame),
                    Ok(None) => break,
                    Err(error) => return (frames, Some(error)),
                }
            }
            assert!(buffer.len() <= LENGTH_PREFIX + MAX_CONTROL_FRAME + piece.len());
        }
        (frames, None)
    };
    let whole = frames(&mut std::iter::once(stream));
    assert_eq!(frames(&mut stream.chunks(piece)), whole);
    for frame in whole.0 {
        let _ = decode_control::<(u64, String, Vec<u64>, Option<Vec<u8>>)>(&frame);
    }
}
