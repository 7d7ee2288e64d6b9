//! What this process keeps of the memory it has freed. It allocates nothing and knows nothing of who does.
#![expect(
    unsafe_code,
    reason = "mallopt(3) and malloc_trim(3) take numbers and change only the allocator's own state"
)]

/// One heap for all threads: with one each, what a burst of work freed on some is kept for them alone. To be called
/// before there is a second thread.
pub fn share_one_heap() {
    #[cfg(target_env = "gnu")]
    // SAFETY: a setting of the allocator; it takes plain numbers.
    // An allocator that does not know it goes on as before.
    let _known = unsafe { libc::mallopt(libc::M_ARENA_MAX, 1) };
}

/// Gives freed memory back to the kernel, also from the middle of the heap, where something above it still lives.
pub fn give_back() {
    #[cfg(target_env = "gnu")]
    // SAFETY: it locks the allocator and hands whole free pages back.
    let _anything = unsafe { libc::malloc_trim(0) };
}

#[cfg(test)]
mod tests {
    #[test]
    #[cfg(target_env = "gnu")]
    fn what_is_freed_below_something_alive_goes_back() {
        let anonymous_kib = || -> u64 {
            let status = std::fs::read_to_string("/proc/self/status").unwrap();
            let line = status.lines().find_map(|l| l.strip_prefix("RssAnon:"));
            let number = line.unwrap().split_whitespace().next().unwrap();
            number.parse().unwrap()
        };
        let mut blocks: Vec<Vec<u8>> = (0..32 * 1024).map(|_| vec![1; 2048]).collect();
        let alive = blocks.pop();
        let full = anonymous_kib();
        drop(blocks);
        super::give_back();
        assert!(
            anonymous_kib() + 32 * 1024 < full,
            "of 64 MiB not even half went back"
        );
        drop(alive);
    }
}
