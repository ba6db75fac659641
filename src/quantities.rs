//! Times and sizes as people write them on a command line.

use crate::Failure;
use std::time::Duration;

/// A time such as `90s`, `10m` or `2h`; seconds without a unit.
pub(crate) fn time(text: &str) -> Result<Duration, Failure> {
    let wrong = || Failure::Usage(format!("`{text}` is no time, expected a number with s, m, h or none"));
    let end = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
    let number: f64 = text[..end].parse().map_err(|_| wrong())?;
    let unit = match text[end..].trim() {
        "" | "s" => 1.0,
        "m" | "min" => 60.0,
        "h" => 3600.0,
        _ => return Err(wrong()),
    };
    Duration::try_from_secs_f64(number * unit).map_err(|_| wrong())
}

/// A size such as `512MB`, `1.5GiB` or `1024`, in bytes. Units count in powers of 1024, as memory does.
pub(crate) fn size(text: &str) -> Result<u64, Failure> {
    let wrong = || Failure::Usage(format!("`{text}` is no size, expected a number with KB, MB, GB or none"));
    let number_end = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
    let number: f64 = text[..number_end].parse().map_err(|_| wrong())?;
    let unit = match text[number_end..].trim().to_ascii_lowercase().as_str() {
        "" | "b" => 1u64,
        "k" | "kb" | "kib" => 1 << 10,
        "m" | "mb" | "mib" => 1 << 20,
        "g" | "gb" | "gib" => 1 << 30,
        "t" | "tb" | "tib" => 1 << 40,
        _ => return Err(wrong()),
    };
    Ok((number * unit as f64) as u64)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_sizes() {
        assert_eq!(size("512MB").unwrap(), 512 << 20);
        assert_eq!(size("1.5 gib").unwrap(), 3 << 29);
        assert_eq!(size("7").unwrap(), 7);
        assert!(size("much").is_err());
    }
}
