//! Arithmetic on symbolic sizes.

use super::*;

fn n(name: &str) -> DimExpr {
    DimExpr::named(name)
}

fn k(value: i64) -> DimExpr {
    value.into()
}

#[test]
fn sums_and_products_have_one_form() {
    let (a, b) = (n("a"), n("b"));
    let left = a.plus(&b).unwrap().times(&a.minus(&b).unwrap()).unwrap();
    let right = a.times(&a).unwrap().minus(&b.times(&b).unwrap()).unwrap();
    assert_eq!(left, right);
    assert_eq!(a.minus(&a).unwrap(), k(0));
    assert_eq!(a.scaled(2).unwrap().offset(-3).unwrap().to_string(), "2*a - 3");
}

#[test]
fn divides_polynomials_without_remainder() {
    let (a, b) = (n("a"), n("b"));
    let sum = a.plus(&b).unwrap().offset(3).unwrap();
    let product = sum.times(&a).unwrap().scaled(64).unwrap();
    assert_eq!(product.exact_div(&sum).unwrap(), a.scaled(64).unwrap());
    assert_eq!(product.exact_div(&a.scaled(16).unwrap()).unwrap(), sum.scaled(4).unwrap());
    assert_eq!(a.exact_div(&b), None);
    assert_eq!(a.exact_div(&k(2)), None);
    assert_eq!(a.exact_div(&k(0)), None);
    assert_eq!(k(i64::MIN).exact_div(&k(-1)), None);
}

#[test]
fn floors_in_canonical_form() {
    let h = n("h");
    // Two convolutions of stride 2 are one of stride 4.
    let half = |x: &DimExpr| x.offset(-1).unwrap().floor_div(&k(2)).unwrap().offset(1).unwrap();
    let quarter = h.offset(-1).unwrap().floor_div(&k(4)).unwrap().offset(1).unwrap();
    assert_eq!(half(&half(&h)), quarter);
    assert_eq!(
        h.scaled(6).unwrap().offset(5).unwrap().floor_div(&k(2)).unwrap(),
        h.scaled(3).unwrap().offset(2).unwrap()
    );
    assert_eq!(k(-7).floor_div(&k(2)).unwrap(), k(-4));
    assert_eq!(k(-7).floor_div(&k(-2)).unwrap(), k(3));
    assert_eq!(k(7).floor_div(&k(-2)).unwrap(), k(-4));
    assert_eq!(k(7).floor_div(&k(0)), None);
}

#[test]
fn rewriting_keeps_the_value() {
    let (a, b) = (n("a"), n("b"));
    let value = |x: i64, y: i64| move |s: &Symbol| Some(if *s == Symbol::Named("a".into()) { x } else { y });
    for p in -7..8 {
        for q in [1, 2, 3, 4, 6] {
            let sum = a.scaled(p).unwrap().plus(&b.scaled(3).unwrap()).unwrap().offset(p).unwrap();
            let once = sum.floor_div(&k(q)).unwrap();
            let twice = once.offset(2).unwrap().floor_div(&k(3)).unwrap();
            for x in 0..9 {
                for y in 0..5 {
                    let expected = (p * x + 3 * y + p).div_euclid(q);
                    assert_eq!(once.evaluate(&value(x, y)), Some(expected));
                    assert_eq!(twice.evaluate(&value(x, y)), Some((expected + 2).div_euclid(3)));
                    let (low, high) = twice.range();
                    assert!(low.is_none_or(|l| l <= (expected + 2).div_euclid(3)));
                    assert!(high.is_none_or(|h| h >= (expected + 2).div_euclid(3)));
                }
            }
        }
    }
}

#[test]
fn bounds_decide_minima() {
    let s = n("s");
    let longer = s.offset(1).unwrap();
    assert_eq!(longer.smaller(&s).unwrap(), s);
    assert_eq!(longer.larger(&k(1)).unwrap(), longer);
    assert_eq!(s.smaller(&k(0)).unwrap(), k(0));
    assert_eq!(s.smaller(&k(4)).unwrap().range(), (Some(0), Some(4)));
    assert!(longer.differs(&k(0)));
    assert!(!s.differs(&k(0)));
}

#[test]
fn broadcasting_absorbs_what_it_knows() {
    let (a, b) = (n("a"), n("b"));
    let both = a.broadcast(&b).unwrap();
    assert_eq!(both, b.broadcast(&a).unwrap());
    assert_eq!(both.broadcast(&a).unwrap(), both);
    assert_eq!(a.broadcast(&k(8)).unwrap(), k(8));
    assert_eq!(a.broadcast(&k(1)).unwrap(), a);
    assert_eq!(k(2).broadcast(&k(3)), None);
}

#[test]
fn grows_only_so_far() {
    let mut sum = k(0);
    let mut unknown = false;
    for i in 0..200 {
        match sum.plus(&n(&format!("s{i}"))) {
            Some(next) => sum = next,
            None => unknown = true,
        }
    }
    assert!(unknown);
    assert_eq!(k(i64::MAX).offset(1), None);
    assert_eq!(n("a").scaled(i64::MAX).unwrap().scaled(2), None);
}

#[test]
fn substitutes() {
    let e = n("a").offset(1).unwrap().floor_div(&k(2)).unwrap();
    let lookup = |s: &Symbol| (*s == Symbol::Named("a".into())).then(|| k(7));
    assert_eq!(e.substitute(&lookup).unwrap(), k(4));
}

#[test]
fn a_size_absorbs_its_own_part() {
    let (s, c) = (n("s"), n("c"));
    let part = s.smaller(&k(512)).unwrap();
    assert_eq!(s.broadcast(&part).unwrap(), s);
    assert_eq!(part.broadcast(&s).unwrap(), s);
    // A cap of 0 would leave nothing of a size of 1, which broadcasts to nothing.
    let open = s.smaller(&c).unwrap();
    assert_ne!(s.broadcast(&open).unwrap(), s);
    assert_eq!(s.broadcast(&s.smaller(&c.offset(1).unwrap()).unwrap()).unwrap(), s);
    assert!(part.equal_where_broadcast(&s) && s.equal_where_broadcast(&part) && !open.equal_where_broadcast(&s));
    let less = s.offset(-3).unwrap();
    let (floored, raised) = (less.larger(&0.into()).unwrap(), less.larger(&2.into()).unwrap());
    assert_eq!(floored.broadcast(&less), Some(less.clone()));
    assert!(less.equal_where_broadcast(&floored) && !less.equal_where_broadcast(&raised));
    for size in 0..9i64 {
        for cap in 1..9 {
            // Wherever the two broadcast, they broadcast to the size.
            let part = size.min(cap);
            let broadcast = [(part == size, size), (part == 1, size), (size == 1, part)].into_iter().find(|b| b.0);
            assert!(broadcast.is_none_or(|b| b.1 == size), "{size} {cap}");
        }
    }
    assert_eq!(part.simpler(&s), &s);
    assert_eq!(s.simpler(&k(4)), &k(4));
}

#[test]
fn prints_as_people_write() {
    let (h, w) = (n("h"), n("w"));
    let quarter = h.offset(-1).unwrap().floor_div(&k(4)).unwrap();
    assert_eq!(quarter.offset(1).unwrap().to_string(), "ceil(h/4)");
    assert_eq!(h.offset(2).unwrap().floor_div(&k(4)).unwrap().to_string(), "floor((h + 2)/4)");
    assert_eq!(h.floor_div(&k(16)).unwrap().scaled(2).unwrap().to_string(), "2*floor(h/16)");
    assert_eq!(h.scaled(3).unwrap().floor_div(&k(2)).unwrap().to_string(), "h + floor(h/2)");
    assert_eq!(h.times(&h).unwrap().floor_div(&w.scaled(2).unwrap()).unwrap().to_string(), "floor(h*h/(2*w))");
    assert_eq!(k(3).minus(&h).unwrap().to_string(), "-h + 3");
    assert_eq!(k(-3).to_string(), "-3");
    assert_eq!(h.larger(&w).unwrap().written(&|_| Some("x.shape[2]".into())).unwrap(), "max(x.shape[2], x.shape[2])");
    assert_eq!(h.written(&|_| None), None);
}

#[test]
fn a_cap_of_one_goes_where_it_makes_no_difference() {
    let s = n("s");
    let first = s.smaller(&k(1)).unwrap();
    // As many as there are but for the first, beside the first: what packed masks compare.
    let shifted = s.plus(&first).unwrap().offset(-1).unwrap().larger(&k(0)).unwrap();
    assert_eq!(shifted, s);
    for size in 0..4 {
        assert_eq!((size + size.min(1) - 1).max(0), size);
    }
    let kept = s.scaled(2).unwrap().plus(&first).unwrap().larger(&n("t")).unwrap();
    assert_eq!(kept.to_string(), "max(2*s + min(1, s), t)");
}
