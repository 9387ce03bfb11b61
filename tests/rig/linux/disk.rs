//! Images for the disk writer inside a Linux guest, and the proof from outside that what it was told is on the disk is there.
//! The blocks' contents are those of `tests/guest/linux/memory.c`.

use anyhow::{Context, Result, ensure};

/// Bytes of a block of the disk writer.
pub const BLOCK_BYTES: usize = 4096;
const MAGIC: u64 = 0x4750_4153_4f4d_494c;
const MIX: u64 = 0xff51_afd7_ed55_8ccd;

/// Word `index` of the content that `seed` stands for.
pub fn word_of(seed: u64, index: u64) -> u64 {
    let word = seed.wrapping_add(index.wrapping_mul(0x9e37_79b9_7f4a_7c15));
    word ^ (word >> 29)
}

fn hash(a: u64, b: u64) -> u64 {
    let mut x = a.wrapping_mul(MIX) ^ b.wrapping_mul(0xc4ce_b9fe_1a85_ec53);
    x ^= x >> 32;
    x = x.wrapping_mul(MIX);
    x ^ (x >> 29)
}

/// What the disk writer left.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DiskState {
    /// Blocks that are whole.
    pub written: u64,
    /// The highest number of a writing.
    pub seq: u64,
    /// Blocks that begin as ours and are not whole: at most the one that was being written may be.
    pub torn: u64,
}

/// Reads the first `mib` MiB of a disk as the disk writer left them.
///
/// # Errors
/// The disk is shorter, or a block holds another block's content.
pub fn examine(disk: &[u8], mib: usize) -> Result<DiskState> {
    let area = disk.get(..mib << 20).with_context(|| format!("the disk has {} bytes only", disk.len()))?;
    let mut state = DiskState { written: 0, seq: 0, torn: 0 };
    for (number, block) in (0u64..).zip(area.chunks_exact(BLOCK_BYTES)) {
        let mut words = block.chunks_exact(8).map(|bytes| u64::from_le_bytes(bytes.try_into().unwrap_or_default()));
        let mut next = || words.next().unwrap_or_default();
        let (magic, of, seq, seed) = (next(), next(), next(), next());
        if magic != MAGIC {
            continue;
        }
        ensure!(of == number, "block {number} holds what belongs to block {of}");
        let whole = seed == hash(number, seq) && (4u64..).zip(words).all(|(index, word)| word == word_of(seed, index));
        if whole {
            state.written += 1;
            state.seq = state.seq.max(seq);
        } else {
            state.torn += 1;
        }
    }
    Ok(state)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn block(number: u64, seq: u64) -> Vec<u8> {
        let seed = hash(number, seq);
        let words = [MAGIC, number, seq, seed].into_iter().chain((4..512).map(|index| word_of(seed, index)));
        words.flat_map(u64::to_le_bytes).collect()
    }

    #[test]
    fn whole_torn_blank_and_misplaced_blocks_are_told_apart() {
        let mut disk = vec![0u8; 1 << 20];
        disk[..4096].copy_from_slice(&block(0, 7));
        disk[4096..8192].copy_from_slice(&block(1, 9));
        assert_eq!(examine(&disk, 1).unwrap(), DiskState { written: 2, seq: 9, torn: 0 });
        disk[5000] ^= 1;
        assert_eq!(examine(&disk, 1).unwrap(), DiskState { written: 1, seq: 7, torn: 1 });
        disk[8192..12_288].copy_from_slice(&block(5, 1));
        assert!(examine(&disk, 1).unwrap_err().to_string().contains("block 2 holds"));
        assert!(examine(&disk, 2).is_err());
    }
}
