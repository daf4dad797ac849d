//! Which sockets another process listens at, by the kernel's tables in `/proc`.
//!
//! Invariant: only listening sockets that the process holds open itself are told, newest first.

use std::collections::HashMap;
use std::ffi::OsStr;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use crate::hypervisor::qemu::nbd::NbdAddress;

/// Listening state in `/proc/net/tcp`.
const TCP_LISTEN: &str = "0A";
/// `__SO_ACCEPTCON` in the flags of `/proc/net/unix`: the socket listens.
const UNIX_LISTENS: u32 = 1 << 16;

/// The addresses at which process `pid` listens, those opened last first.
pub(super) async fn listeners(pid: u32) -> io::Result<Vec<NbdAddress>> {
    tokio::task::spawn_blocking(move || {
        let proc = PathBuf::from(format!("/proc/{pid}"));
        let mut tables = HashMap::new();
        // The process may be in a network of its own: its tables, not ours.
        tables.extend(unix_listeners(&std::fs::read(proc.join("net/unix"))?));
        for table in ["net/tcp", "net/tcp6"] {
            // IPv6 may be absent.
            if let Ok(text) = std::fs::read_to_string(proc.join(table)) {
                tables.extend(tcp_listeners(&text));
            }
        }
        let mut found = Vec::new();
        for entry in std::fs::read_dir(proc.join("fd"))? {
            let entry = entry?;
            let number = entry.file_name().to_str().and_then(|n| n.parse::<u32>().ok());
            // A descriptor may be closed while we look.
            let Ok(target) = std::fs::read_link(entry.path()) else { continue };
            if let (Some(number), Some(inode)) = (number, socket_inode(&target))
                && let Some(address) = tables.remove(&inode)
            {
                found.push((number, reachable(&proc, address)));
            }
        }
        found.sort_by_key(|(number, _)| std::cmp::Reverse(*number));
        Ok(found.into_iter().map(|(_, address)| address).collect())
    })
    .await
    .unwrap_or_else(|_| Err(io::ErrorKind::Interrupted.into()))
}

/// The path under which we reach a socket that the process named in its own terms.
fn reachable(proc: &Path, address: NbdAddress) -> NbdAddress {
    let NbdAddress::Unix(path) = address else { return address };
    if path.is_relative() {
        return NbdAddress::Unix(proc.join("cwd").join(path));
    }
    if !path.exists()
        && let Ok(inside) = path.strip_prefix("/")
        && let other_root = proc.join("root").join(inside)
        && other_root.exists()
    {
        return NbdAddress::Unix(other_root);
    }
    NbdAddress::Unix(path)
}

fn socket_inode(target: &Path) -> Option<u64> {
    target.to_str()?.strip_prefix("socket:[")?.strip_suffix(']')?.parse().ok()
}

/// `Num: RefCount Protocol Flags Type St Inode Path`
fn unix_listeners(table: &[u8]) -> HashMap<u64, NbdAddress> {
    table.split(|b| *b == b'\n').skip(1).filter_map(unix_listener).collect()
}

fn unix_listener(line: &[u8]) -> Option<(u64, NbdAddress)> {
    let mut rest = line;
    let mut word = || {
        rest = rest.trim_ascii_start();
        let end = rest.iter().position(|b| *b == b' ').unwrap_or(rest.len());
        let (word, after) = rest.split_at(end);
        rest = after;
        std::str::from_utf8(word).ok()
    };
    let [_, _, _, flags, _, _, inode] = [(); 7].map(|()| word());
    let listens = u32::from_str_radix(flags?, 16).ok()? & UNIX_LISTENS != 0;
    // What follows one space is the name, spaces and all; sockets without a name have none.
    let name = rest.strip_prefix(b" ")?;
    let address = match name.strip_prefix(b"@") {
        Some(name) => NbdAddress::Abstract(name.to_vec()),
        None => NbdAddress::Unix(PathBuf::from(OsStr::from_bytes(name))),
    };
    listens.then_some((inode?.parse().ok()?, address))
}

/// `sl local_address rem_address st tx:rx tr:when retrnsmt uid timeout inode ..`
fn tcp_listeners(table: &str) -> HashMap<u64, NbdAddress> {
    let mut found = HashMap::new();
    for line in table.lines().skip(1) {
        let fields: Vec<&str> = line.split_ascii_whitespace().collect();
        let (Some(local), Some(&TCP_LISTEN), Some(inode)) =
            (fields.get(1), fields.get(3), fields.get(9))
        else {
            continue;
        };
        if let (Some(address), Ok(inode)) = (tcp_address(local), inode.parse()) {
            found.insert(inode, NbdAddress::Tcp(address));
        }
    }
    found
}

fn tcp_address(text: &str) -> Option<SocketAddr> {
    let (ip, port) = text.split_once(':')?;
    let port = u16::from_str_radix(port, 16).ok()?;
    // Each group of eight digits is a big-endian word printed as the host's own number.
    let words = ip
        .as_bytes()
        .chunks(8)
        .map(|word| u32::from_str_radix(std::str::from_utf8(word).ok()?, 16).ok())
        .map(|word| word.map(u32::from_be))
        .collect::<Option<Vec<u32>>>()?;
    let ip = match words[..] {
        [word] => IpAddr::V4(Ipv4Addr::from(word)),
        [a, b, c, d] => {
            let [a, b, c, d] = [a, b, c, d].map(u128::from);
            IpAddr::V6(Ipv6Addr::from(a << 96 | b << 64 | c << 32 | d))
        }
        _ => return None,
    };
    // A server that listens everywhere is reached here.
    let ip = match ip {
        IpAddr::V4(ip) if ip.is_unspecified() => IpAddr::V4(Ipv4Addr::LOCALHOST),
        IpAddr::V6(ip) if ip.is_unspecified() => IpAddr::V6(Ipv6Addr::LOCALHOST),
        ip => ip,
    };
    Some(SocketAddr::new(ip, port))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn listening_unix_sockets_are_read_with_their_whole_path() {
        let table = b"Num       RefCount Protocol Flags    Type St Inode Path\n\
            0000000000000000: 00000002 00000000 00010000 0001 01   511 /run/a b.sock\n\
            0000000000000000: 00000002 00000000 00010000 0001 01 12345 @abstract\n\
            0000000000000000: 00000003 00000000 00000000 0001 03 12346 /run/connected\n\
            0000000000000000: 00000002 00000000 00010000 0001 01 12347\n";
        let found = unix_listeners(table);
        assert_eq!(found.len(), 2);
        assert_eq!(found[&511], NbdAddress::Unix("/run/a b.sock".into()));
        assert_eq!(found[&12345], NbdAddress::Abstract(b"abstract".to_vec()));
    }

    #[test]
    fn listening_tcp_sockets_are_read_and_everywhere_means_here() {
        let row = |local: &str, state: &str, inode: u32| {
            format!(
                "0: {local} 00000000:0000 {state} 00000000:00000000 00:00000000 00000000 0 0 {inode} 1\n"
            )
        };
        let table = format!(
            "  sl  local_address\n{}{}{}{}",
            row("0100007F:2A31", "0A", 7),
            row("00000000:2A32", "0A", 8),
            row("00000000000000000000000001000000:2A33", "0A", 9),
            row("0100007F:2A34", "01", 10),
        );
        let found = tcp_listeners(&table);
        let tcp = |text: &str| NbdAddress::Tcp(text.parse().unwrap());
        assert_eq!(found.len(), 3);
        assert_eq!(found[&7], tcp("127.0.0.1:10801"));
        assert_eq!(found[&8], tcp("127.0.0.1:10802"));
        assert_eq!(found[&9], tcp("[::1]:10803"));
    }

    #[tokio::test]
    async fn our_own_listeners_are_found_newest_first() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("first.sock");
        let _first = std::os::unix::net::UnixListener::bind(&path).unwrap();
        let second = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let found = listeners(std::process::id()).await.unwrap();
        assert!(found.contains(&NbdAddress::Unix(path)), "{found:?}");
        assert!(found.contains(&NbdAddress::Tcp(second.local_addr().unwrap())), "{found:?}");
    }
}
