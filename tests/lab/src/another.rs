//! Another build of `culvert`: the same binary whose programs are other instructions that do the same, so that everything
//! an upgrade replaces is replaced by code the kernel tells apart (its tags differ), and back.
//!
//! It rewrites the eBPF object inside the binary and knows nothing of what the programs are for.

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};

use crate::Lab;
use crate::culvert::culvert_binary;

/// How an eBPF object begins: ELF, 64 bits, little-endian, version 1, eight unused bytes, relocatable, for BPF.
const OBJECT: [u8; 20] = *b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0\x01\0\xf7\0";

/// Of a section: it holds the program's own bytes.
const SHT_PROGBITS: u64 = 1;
/// Of a section: it is executed.
const SHF_EXECINSTR: u64 = 4;

/// Size of an instruction.
const INSTRUCTION: usize = 8;
/// `r = imm`, 64 bits: the number is extended by its sign.
const MOV64: u8 = 0xb7;
/// `w = imm`, 32 bits: the upper half becomes zero, which for numbers of at least 0 is the same.
const MOV32: u8 = 0xb4;
/// The first half of an instruction of two.
const LOAD_IMM64: u8 = 0x18;

impl Lab {
    /// Another build than the binary that is tested.
    pub fn another_build(&self) -> Result<PathBuf> {
        let to = self.scratch().join("another-culvert");
        another_build(&culvert_binary()?, &to)?;
        Ok(to)
    }
}

/// Copies a binary and writes each `r = imm` of its programs in the other of its two forms.
pub fn another_build(from: &Path, to: &Path) -> Result<()> {
    let mut bytes = fs::read(from).with_context(|| format!("reading {}", from.display()))?;
    let starts: Vec<usize> = bytes
        .windows(OBJECT.len())
        .enumerate()
        .filter_map(|(at, window)| (window == OBJECT).then_some(at))
        .collect();
    let [start] = starts[..] else {
        bail!(
            "{} eBPF objects in {}, not one",
            starts.len(),
            from.display()
        );
    };
    rewrite(&mut bytes[start..])?;
    fs::write(to, bytes)
        .and_then(|()| fs::set_permissions(to, fs::Permissions::from_mode(0o755)))
        .with_context(|| format!("writing {}", to.display()))
}

/// Rewrites every executed section of the object that begins here.
fn rewrite(object: &mut [u8]) -> Result<()> {
    // Elf64_Ehdr: e_shoff, e_shentsize, e_shnum.
    let table = usize::try_from(number(object, 0x28, 8)?)?;
    let size = usize::try_from(number(object, 0x3a, 2)?)?;
    let count = usize::try_from(number(object, 0x3c, 2)?)?;
    for section in 0..count {
        // Elf64_Shdr: sh_type, sh_flags, sh_offset, sh_size.
        let header = table + section * size;
        let code = number(object, header + 4, 4)? == SHT_PROGBITS
            && number(object, header + 8, 8)? & SHF_EXECINSTR != 0;
        if !code {
            continue;
        }
        let at = usize::try_from(number(object, header + 0x18, 8)?)?;
        let length = usize::try_from(number(object, header + 0x20, 8)?)?;
        let code = object.get_mut(at..at + length).context("a cut section")?;
        ensure!(
            length == 0 || swap(code)? > 0,
            "section {section} has no instruction that could be written otherwise"
        );
    }
    Ok(())
}

/// Writes each `r = imm` of a section in its other form; how many there were.
fn swap(code: &mut [u8]) -> Result<usize> {
    let mut swapped = 0;
    let mut second_half = false;
    for instruction in code.chunks_exact_mut(INSTRUCTION) {
        if std::mem::take(&mut second_half) {
            continue;
        }
        let imm = number(instruction, 4, 4)?;
        let other = match instruction[0] {
            MOV64 => MOV32,
            MOV32 => MOV64,
            opcode => {
                second_half = opcode == LOAD_IMM64;
                continue;
            }
        };
        if imm <= i32::MAX as u64 {
            instruction[0] = other;
            swapped += 1;
        }
    }
    Ok(swapped)
}

fn number(bytes: &[u8], at: usize, size: usize) -> Result<u64> {
    let found = bytes.get(at..at + size).context("a cut object")?;
    let mut number = [0; 8];
    number[..size].copy_from_slice(found);
    Ok(u64::from_le_bytes(number))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_means_the_same_is_written_otherwise() {
        let word = |opcode: u8, imm: i32| {
            let [a, b, c, d] = imm.to_le_bytes();
            [opcode, 0, 0, 0, a, b, c, d]
        };
        let mut code = [
            word(MOV64, 0),
            word(MOV64, -1),
            word(LOAD_IMM64, 7),
            // The upper half of that number, whatever it looks like.
            word(MOV64, 7),
            word(MOV32, i32::MAX),
            word(0x95, 0),
        ]
        .concat();
        assert_eq!(swap(&mut code).unwrap(), 2);
        let opcodes: Vec<u8> = code.chunks(INSTRUCTION).map(|i| i[0]).collect();
        assert_eq!(opcodes, [MOV32, MOV64, LOAD_IMM64, MOV64, MOV64, 0x95]);
        assert_eq!(swap(&mut code).unwrap(), 2);
        assert_eq!(code[0], MOV64);
    }
}
