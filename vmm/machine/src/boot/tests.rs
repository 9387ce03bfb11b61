//! Tests of the loaders on images made here. Not of a guest that runs: that is `tests/`.
#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing)]
use super::*;
use crate::memory::{MemoryConfig, Ram};
use std::io::Write;

pub(crate) fn file(bytes: &[u8]) -> tempfile::NamedTempFile {
    let mut file = tempfile::NamedTempFile::new().unwrap();
    file.write_all(bytes).unwrap();
    file
}

fn u32_at(ram: &GuestRam, address: u64) -> u32 {
    ram.read_obj(GuestAddress(address)).unwrap()
}

fn u64_at(ram: &GuestRam, address: u64) -> u64 {
    ram.read_obj(GuestAddress(address)).unwrap()
}

/// A 64-bit ELF with one loaded piece at 1 MiB and, if wanted, a Xen note.
pub(crate) fn elf(code: &[u8], note: bool) -> Vec<u8> {
    let mut image = b"\x7fELF\x02\x01\x01".to_vec();
    image.resize(16, 0);
    image.extend([2, 0, 62, 0, 1, 0, 0, 0]);
    for value in [0x10_0000_u64, 64, 0] {
        image.extend(value.to_le_bytes());
    }
    image.extend([0, 0, 0, 0, 64, 0, 56, 0, 2, 0, 64, 0, 0, 0, 0, 0]);
    let mut header = |kind: u32, offset: u64, address: u64, bytes: u64| {
        image.extend(kind.to_le_bytes());
        image.extend(7_u32.to_le_bytes());
        for value in [offset, address, address, bytes, bytes, 4] {
            image.extend(value.to_le_bytes());
        }
    };
    header(1, 0x200, 0x10_0000, code.len() as u64);
    header(if note { 4 } else { 0 }, 0x100, 0, 20);
    image.resize(0x100, 0);
    for word in [4_u32, 4, 18] {
        image.extend(word.to_le_bytes());
    }
    image.extend(b"Xen\0");
    image.extend(0x10_0004_u32.to_le_bytes());
    image.resize(0x200, 0);
    image.extend(code);
    image
}

fn bzimage(version: u16) -> Vec<u8> {
    let mut image = vec![0; 0x400];
    image[0x1f1] = 1;
    image[0x202..0x206].copy_from_slice(b"HdrS");
    image[0x206..0x208].copy_from_slice(&version.to_le_bytes());
    image[0x211] = 1;
    image[0x214..0x218].copy_from_slice(&0x10_0000_u32.to_le_bytes());
    image[0x22c..0x230].copy_from_slice(&0x7fff_ffff_u32.to_le_bytes());
    image[0x238..0x23c].copy_from_slice(&64_u32.to_le_bytes());
    image.extend(b"protected-mode code");
    image
}

fn try_load(image: &[u8], initramfs: Option<&[u8]>, cmdline: &str) -> (Ram, Result<Entry, BootError>) {
    let ram = Ram::new(&MemoryConfig::new(16 << 20)).unwrap();
    let kernel = file(image);
    let initramfs = initramfs.map(file);
    let config = BootConfig {
        kernel: kernel.path().to_owned(),
        initramfs: initramfs.as_ref().map(|file| file.path().to_owned()),
        cmdline: cmdline.to_owned(),
    };
    let entry = load(ram.guest(), 2, 0, &config);
    (ram, entry)
}

#[test]
fn pvh_is_loaded_with_its_start_info() {
    let (ram, entry) = try_load(&elf(b"code", true), Some(&[7; 5000]), "console=ttyS0");
    assert_eq!(entry.unwrap(), Entry { address: 0x10_0004, ebx: 0x7000, esi: 0 });
    let ram = ram.guest();
    assert_eq!(u32_at(ram, 0x10_0000), u32::from_le_bytes(*b"code"));
    assert_eq!((u32_at(ram, 0x7000), u32_at(ram, 0x7004), u32_at(ram, 0x700c)), (0x336e_c578, 1, 1));
    let (modules, cmdline, map) = (u64_at(ram, 0x7010), u64_at(ram, 0x7018), u64_at(ram, 0x7028));
    let mut text = [0; 14];
    ram.read_slice(&mut text, GuestAddress(cmdline)).unwrap();
    assert_eq!(&text, b"console=ttyS0\0");
    assert_eq!((u64_at(ram, modules), u64_at(ram, modules + 8)), (0xff_e000, 5000));
    assert_eq!(u32_at(ram, 0xff_e000), 0x0707_0707);
    assert_eq!(u32_at(ram, 0x7030), 3);
    assert_eq!((u64_at(ram, map + 48), u64_at(ram, map + 56), u32_at(ram, map + 64)), (0x10_0000, 15 << 20, 1));
}

#[test]
fn bzimage_is_loaded_with_its_zero_page() {
    let (ram, entry) = try_load(&bzimage(0x20f), Some(&[9; 100]), "quiet");
    assert_eq!(entry.unwrap(), Entry { address: 0x10_0000, ebx: 0, esi: 0x7000 });
    let ram = ram.guest();
    let mut code = [0; 19];
    ram.read_slice(&mut code, GuestAddress(0x10_0000)).unwrap();
    assert_eq!(&code, b"protected-mode code");
    let zero_page: [u8; 0x300] = {
        let mut page = [0; 0x300];
        ram.read_slice(&mut page, GuestAddress(0x7000)).unwrap();
        page
    };
    assert_eq!(&zero_page[0x202..0x206], b"HdrS");
    assert_eq!((zero_page[0x210], zero_page[0x1e8]), (0xff, 3));
    assert_eq!(u32::from_le_bytes(zero_page[0x228..0x22c].try_into().unwrap()), 0x2_0000);
    assert_eq!(u32::from_le_bytes(zero_page[0x218..0x21c].try_into().unwrap()), 0xff_f000);
    assert_eq!(u32::from_le_bytes(zero_page[0x21c..0x220].try_into().unwrap()), 100);
}

#[test]
fn what_cannot_be_booted_is_refused_in_words() {
    /// Kernel, initramfs, command line, and what the refusal must say.
    type Case<'a> = (Vec<u8>, Option<&'a [u8]>, String, &'a str);
    let cases: [Case<'_>; 9] = [
        (b"#!/bin/sh".to_vec(), None, String::new(), "neither an ELF"),
        (Vec::new(), None, String::new(), "neither an ELF"),
        (elf(b"code", false), None, String::new(), "no PVH entry"),
        (elf(b"code", true)[..0x80].to_vec(), None, String::new(), "no kernel"),
        (b"\x7fELF\x01\x01\x01".to_vec(), None, String::new(), "no kernel"),
        (bzimage(0x204), None, String::new(), "too old"),
        (bzimage(0x20f), None, "x".repeat(65), "limit of 64"),
        (elf(b"code", true), None, "a\0b".to_owned(), "NUL"),
        (elf(b"code", true), Some(&[0; 15 << 20]), String::new(), "initramfs does not fit"),
    ];
    for (image, initramfs, cmdline, expected) in cases {
        let error = try_load(&image, initramfs, &cmdline).1.unwrap_err().to_string();
        assert!(error.contains(expected), "{error:?} lacks {expected:?}");
    }
    let config = BootConfig { kernel: "/nonexistent".into(), initramfs: None, cmdline: String::new() };
    let ram = Ram::new(&MemoryConfig::new(16 << 20)).unwrap();
    assert!(matches!(load(ram.guest(), 1, 0, &config), Err(BootError::File { what: "kernel", .. })));
}
