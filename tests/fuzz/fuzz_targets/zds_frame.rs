//! The program of target `zds_frame`.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| culvert_fuzz::zds_frame(data));
