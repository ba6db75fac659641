//! What times of runs depend on besides models: the processor, as the system tells.

/// The processor's model and features, and how many of its cores this process may use: times and, in the last bits,
/// results differ between machines where this does.
pub fn machine() -> String {
    let cores = std::thread::available_parallelism().map_or(0, usize::from);
    let text = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let line = |key: &str| {
        let line = text.lines().find_map(|line| line.strip_prefix(key))?;
        Some(line.trim_start_matches([' ', '\t', ':']).to_owned())
    };
    // On Arm systems the name is elsewhere, and the features are called so.
    let model = line("model name").or_else(|| line("CPU part")).unwrap_or_default();
    let features = line("flags").or_else(|| line("Features")).unwrap_or_default();
    format!("{} {model}, {cores} cores, {features}", std::env::consts::ARCH)
}

/// Whether this processor adds products of bytes in 32 bits (VNNI); `None` where all of its architecture do.
pub fn adds_bytes_in_32_bits() -> Option<bool> {
    #[cfg(any(target_arch = "x86", target_arch = "x86_64"))]
    return Some(std::arch::is_x86_feature_detected!("avx512vnni") || std::arch::is_x86_feature_detected!("avxvnni"));
    #[cfg(not(any(target_arch = "x86", target_arch = "x86_64")))]
    None
}

#[cfg(test)]
mod tests {
    #[test]
    fn says_what_it_is_the_same_way_every_time() {
        let found = super::machine();
        assert!(found.starts_with(std::env::consts::ARCH) && found == super::machine(), "{found}");
    }
}
