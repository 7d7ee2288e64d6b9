//! The program of target `decisions`.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| culvert_fuzz::decisions(data));
