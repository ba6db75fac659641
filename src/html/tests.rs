use super::*;
use crate::{
    latency::{Latency, LatencySide},
    report::{
        BudgetRow, CachePort, CacheReport, FusedKernels, KeptNode, OutputLine, OutputScores, Plan, PlanChoice,
        PlanCost, PrecisionReport, QuantizationReport, Refusal, Side,
    },
};
use scraper::{Html, Selector};

const NASTY: &str = "a<b>&\"quote\"'é中</script>";

fn report() -> Report {
    let side = |nodes: u64| Side { path: format!("models/{NASTY}.onnx"), nodes, nodes_total: nodes, ..Side::default() };
    let line = |name: &str, changes: usize, error: Option<f64>| PassLine {
        name: name.to_owned(),
        kind: "equivalent".to_owned(),
        changes,
        refusals: vec![Refusal { reason: format!("because {NASTY}"), count: 3, example: NASTY.to_owned() }],
        seconds: 0.25,
        nodes_delta: -(changes as i64),
        weight_bytes_delta: -2048,
        flops_delta: 0,
        error,
        dropped: None,
    };
    let output = OutputLine {
        name: NASTY.to_owned(),
        scores: OutputScores::new([("max-abs", 3e-6), ("rel-l2", 1.25e-7), ("cosine", 1.0)]),
        limit: Some(1e-4),
        excuse: None,
        uncompared: None,
    };
    Report {
        version: "9.9.9".to_owned(),
        command: vec!["optimize".to_owned(), format!("{NASTY}.onnx"), "-o".to_owned(), "out.onnx".to_owned()],
        seed: 7,
        calibration: None,
        input: Side { flops: 1_234_567, file_bytes: 3 << 20, ..side(1200) },
        output: Side { flops: 1_000_000, file_bytes: 1 << 20, opset: 17, ..side(345) },
        passes: vec![line("fold-batch-norm", 5, Some(3e-7)), line("drop-casts", 0, None)],
        plan: None,
        auto: None,
        precision: None,
        kv_cache: None,
        quantization: None,
        verify: Some(Verify {
            set: "random".to_owned(),
            samples: 2,
            metric: "rel-l2".to_owned(),
            why: None,
            before: 0.0,
            after: 1.25e-7,
            drop: 1.25e-7,
            limit: 1e-4,
            worst: Some(NASTY.to_owned()),
            passed: true,
            detail: None,
            runtime: "ONNX Runtime 1.2.3".to_owned(),
            sizes: Vec::new(),
            left_out: Vec::new(),
            note: None,
            outputs: vec![output],
        }),
        latency: None,
        layers: vec![LayerLine {
            name: NASTY.to_owned(),
            op: "Conv".to_owned(),
            flops: 900_000,
            weight_bytes: 512,
            error: Some(0.01),
        }],
        warnings: vec![format!("careful: {NASTY}")],
        seconds: 1.5,
        peak_rss_bytes: 64 << 20,
    }
}

fn parsed(report: &Report) -> Html {
    Html::parse_document(&page(report))
}

fn texts(page: &Html, selector: &str) -> Vec<String> {
    page.select(&Selector::parse(selector).unwrap()).map(|e| e.text().collect::<String>().trim().to_owned()).collect()
}

#[test]
fn numbers_are_those_of_the_report() {
    let page = parsed(&report());
    let cells = texts(&page, "#sizes td");
    for number in ["1,200", "345", "1,234,567", "1,000,000", "3.00 MiB", "1.00 MiB", "−66.7 %"] {
        assert!(cells.iter().any(|c| c == number), "{number}: {cells:?}");
    }
    assert_eq!(texts(&page, "#outputs td")[..5], [NASTY, "1.25e-7", "", "1.00e-4", "3.00e-6"]);
    assert_eq!(texts(&page, "#layers td")[..5], [NASTY, "Conv", "900.00 k", "", "512 B"]);
    assert_eq!(texts(&page, "#passes td")[..5], ["fold-batch-norm", "equivalent", "5", "−5", "−2.0 KiB"]);
    assert_eq!(texts(&page, "#refusals details summary"), ["fold-batch-norm", "drop-casts"]);
    assert_eq!(texts(&page, ".verdict.good"), ["Verified against the original."]);
}

#[test]
fn the_data_is_the_json_report() {
    let report = report();
    let page = parsed(&report);
    let data: serde_json::Value = serde_json::from_str(&texts(&page, "#report")[0]).unwrap();
    assert_eq!(data, serde_json::to_value(&report).unwrap());
}

#[test]
fn names_cannot_leave_their_place() {
    let page = parsed(&report());
    assert!(texts(&page, "b").is_empty());
    assert_eq!(page.select(&Selector::parse("script").unwrap()).count(), 1);
    assert_eq!(texts(&page, ".warnings li"), [format!("careful: {NASTY}")]);
    assert_eq!(texts(&page, "pre"), [format!("optimize '{}.onnx' -o out.onnx", NASTY.replace('\'', "'\\''"))]);
}

#[test]
fn nothing_is_fetched() {
    let html = page(&report());
    for word in ["src=", "url(", "@import", "http:", "https:"] {
        assert!(!html.contains(word), "{word}");
    }
}

#[test]
fn sections_without_data_are_absent() {
    let bare = Report { verify: None, layers: Vec::new(), warnings: Vec::new(), ..report() };
    let headings = texts(&parsed(&bare), "h2");
    assert_eq!(headings, ["Before and after", "Passes", "Reproduce"]);
}

#[test]
fn half_precision_and_caches_have_sections() {
    let kept = |node: &str, reason: &str| KeptNode { node: format!("`{node}` {NASTY}"), reason: reason.to_owned() };
    let precision = PrecisionReport {
        dtype: "float16".to_owned(),
        interface: false,
        nodes: 1234,
        kept: vec![kept("a", "it counts"), kept("b", NASTY), kept("c", NASTY)],
        casts: 7,
        dropped_casts: 2,
        masks: vec![NASTY.to_owned()],
        ranges: "not proven".to_owned(),
        simulated_error: Some(4.5e-4),
        limit: 2e-3,
        loaded: Some("ONNX Runtime 1.2.3".to_owned()),
        refused_by_runtime: None,
    };
    let caches = CacheReport {
        dtype: "int8".to_owned(),
        scales: "per channel".to_owned(),
        nodes: 30,
        kept: Vec::new(),
        ports: vec![CachePort {
            name: NASTY.to_owned(),
            before: "float[1,P]".to_owned(),
            after: "int8[1,P]".to_owned(),
        }],
        bytes_before: 46_080,
        bytes_after: 11_520,
        compared: None,
        limit: 5e-2,
    };
    let page = parsed(&Report { precision: Some(precision), kv_cache: Some(caches), ..report() });
    let headings = texts(&page, "h2");
    assert!(
        ["Half precision", "Key-value caches"].iter().all(|heading| headings.iter().any(|h| h == heading)),
        "{headings:?}"
    );
    let cells = texts(&page, "#precision td");
    for text in
        ["1,234", "3", "7", "4.50e-4", "2.00e-3", "not proven (--calib measures them)", "ONNX Runtime 1.2.3", NASTY]
    {
        assert!(cells.iter().any(|cell| cell == text), "{text}: {cells:?}");
    }
    // The most frequent reason comes first, with the first node that has it.
    assert_eq!(texts(&page, "#kept td")[..3], [NASTY, "2", &format!("`b` {NASTY}")]);
    assert_eq!(texts(&page, "#caches td"), [NASTY, "float[1,P]", "int8[1,P]"]);
    assert!(texts(&page, "#cacheskept td").is_empty());
    assert!(texts(&page, ".caption").iter().any(|text| text.contains("11,520 bytes in place of 46,080")));
}

#[test]
fn whole_numbers_have_a_section() {
    let fused = FusedKernels {
        kernels: [("QLinearConv".to_owned(), 40)].into(),
        quantize: vec!["a".to_owned()],
        dequantize: vec!["b".to_owned(), NASTY.to_owned()],
    };
    let quantization = QuantizationReport {
        recipe: "cpu".to_owned(),
        layers: 41,
        share: 0.975,
        kept: vec![KeptNode { node: NASTY.to_owned(), reason: NASTY.to_owned() }],
        fused: Some(fused),
        largest_code: 127,
        vnni: Some(false),
    };
    let page = parsed(&Report { quantization: Some(quantization), ..report() });
    assert!(texts(&page, "h2").iter().any(|heading| heading == "Whole numbers"));
    let cells = texts(&page, "#quantization td");
    for text in ["41", "97.5 %", "127", "QLinearConv", "40", "DequantizeLinear outside of kernels", "2"] {
        assert!(cells.iter().any(|cell| cell == text), "{text}: {cells:?}");
    }
    assert_eq!(texts(&page, "#floats td"), [NASTY, "1", NASTY]);
    assert!(texts(&page, ".caption").iter().any(|text| text.contains("sums may overflow here")));
}

/// A plan within one budget and beyond another.
fn plan() -> Plan {
    let choice = |site: &str, option: &str, bytes: u64, error: f64| PlanChoice {
        site: site.to_owned(),
        option: option.to_owned(),
        method: None,
        cost: PlanCost { bytes, parameters: 1500, flops: 2 * bytes, latency_ms: None },
        error,
    };
    let row = |limit: f64, allowed: f64, used: f64, share: f64| BudgetRow { limit, allowed, used, share };
    Plan {
        budget: [("size", row(0.5, 4096.0, 2048.0, 0.25)), ("latency", row(0.7, 1.4, 1.5, 0.75))]
            .map(|(key, row)| (key.to_owned(), row))
            .into(),
        choices: vec![choice("layer.0<x>", "int8", 2048, 0.001), choice("layer.1", "rank 16", 1024, 0.004)],
        ..Plan::default()
    }
}

#[test]
fn a_plan_is_a_table_of_choices() {
    let page = parsed(&Report { plan: Some(plan()), ..report() });
    let cells = texts(&page, "#plan td");
    assert_eq!(cells[..10], ["layer.0<x>", "int8", "2.0 KiB", "", "1,500", "", "4.10 k", "", "1.00e-3", ""]);
    let budget = texts(&page, "#budget td");
    assert_eq!(budget[..5], ["latency, ms", "1.400", "70.0 %", "1.500", "75.0 %"]);
    assert_eq!(budget[6..11], ["size", "4.0 KiB", "50.0 %", "2.0 KiB", "25.0 %"]);
    // What is beyond its limit is seen.
    assert_eq!(page.select(&Selector::parse("#budget .bad").unwrap()).count(), 1);
}

#[test]
fn latency_shows_both_models() {
    let side = |median_ms: f64| LatencySide {
        path: "m.onnx".to_owned(),
        runs: 100,
        median_ms,
        q1_ms: median_ms * 0.9,
        q3_ms: median_ms * 1.1,
        runs_per_second: 1000.0 / median_ms,
        samples_per_second: None,
        load_ms: 20.0,
        first_run_ms: 3.0,
        peak_rss_bytes: Some(32 << 20),
        copy_in_ms: None,
        copy_out_ms: None,
        copies_in_run: Default::default(),
        placement: None,
    };
    let latency = Latency {
        ep: "cpu".to_owned(),
        device: 0,
        threads: 1,
        runtime: "ONNX Runtime 1.2.3".to_owned(),
        inputs: "x [1, 3]".to_owned(),
        before_ms: 2.0,
        after_ms: Some(1.0),
        ratio: Some(0.5),
        spread: 0.01,
        verdict: Some("faster".to_owned()),
        before: side(2.0),
        after: Some(side(1.0)),
    };
    let page = parsed(&Report { latency: Some(latency), ..report() });
    let cells = texts(&page, "#latency td");
    assert_eq!(
        (cells[0].as_str(), cells[1].as_str(), cells[7].as_str(), cells[8].as_str()),
        ("before", "2.000", "after", "1.000")
    );
}

#[test]
fn colours_can_be_told_apart() {
    let (light, dark) = STYLE.split_once("prefers-color-scheme: dark").unwrap();
    for scheme in [light, dark] {
        let colour = |name: &str| {
            let at = scheme.split_once(&format!("--{name}: #")).unwrap().1;
            let part = |i: usize| f64::from(u8::from_str_radix(&at[i..i + 2], 16).unwrap()) / 255.0;
            let linear = |c: f64| if c <= 0.04045 { c / 12.92 } else { ((c + 0.055) / 1.055).powf(2.4) };
            0.2126 * linear(part(0)) + 0.7152 * linear(part(2)) + 0.0722 * linear(part(4))
        };
        for ground in ["page", "panel"] {
            // What WCAG 2 asks of text, and of graphics.
            for (name, least) in
                [("ink", 4.5), ("quiet", 4.5), ("good", 4.5), ("bad", 4.5), ("before", 3.0), ("after", 3.0)]
            {
                let (a, b) = (colour(name), colour(ground));
                let contrast = (a.max(b) + 0.05) / (a.min(b) + 0.05);
                assert!(contrast >= least, "--{name} on --{ground}: {contrast:.2}");
            }
        }
    }
}

/// A change of the page shows itself here; `UPDATE_GOLDEN=1` writes the file anew.
#[test]
fn the_page_is_what_it_was() {
    let path = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("src/html/golden.html");
    // The style has a file of its own.
    let found = page(&Report { plan: Some(plan()), ..report() }).replace(STYLE, "");
    if std::env::var_os("UPDATE_GOLDEN").is_some() {
        std::fs::write(&path, &found).unwrap();
    }
    assert!(std::fs::read_to_string(&path).unwrap() == found, "UPDATE_GOLDEN=1 accepts what changed");
}
