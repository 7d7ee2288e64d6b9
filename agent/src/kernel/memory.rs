//! What this process keeps of the memory it has freed. It allocates nothing and knows nothing of who does.
#![expect(
    unsafe_code,
    reason = "mallopt(3), malloc_trim(3) and mallinfo2(3) take numbers at most and concern only the allocator's own state"
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

/// Bytes of the heap that somebody uses: what is resident beyond them is the allocator's. None where it does not count.
pub fn in_use() -> Option<usize> {
    #[cfg(target_env = "gnu")]
    {
        // SAFETY: it locks the allocator and adds up its own numbers.
        let info = unsafe { libc::mallinfo2() };
        Some(info.uordblks + info.hblkhd)
    }
    #[cfg(not(target_env = "gnu"))]
    None
}

#[cfg(test)]
mod tests {
    #[test]
    #[cfg(target_env = "gnu")]
    fn what_is_alive_is_counted() {
        let before = super::in_use().unwrap();
        let alive: Vec<Vec<u8>> = (0..1024).map(|_| vec![1; 32 << 10]).collect();
        assert!(super::in_use().unwrap() > before + (16 << 20));
        drop(alive);
    }

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
