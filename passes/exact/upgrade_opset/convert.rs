//! What to do with one node whose operator changed in one version.

use crate::Refusal;
use lathe_analysis::{DimExpr, Facts};
use lathe_ir::{DataType, Graph, Node, NodeId, Tensor, ValueId};

/// A node of the standard domain about to become valid in the next version.
pub(super) struct Site<'a> {
    pub(super) graph: &'a mut Graph,
    pub(super) facts: &'a mut Facts,
    pub(super) id: NodeId,
    /// The version that the model is converted to in the end.
    pub(super) to: i64,
}

type Step = Result<(), Refusal>;

/// Makes a node that is valid just before `version`, which changed its operator, mean the same in `version`.
pub(super) fn convert(site: &mut Site, version: i64) -> Step {
    let op = site.node().op_type.clone();
    match (op.as_str(), version) {
        ("Attention", _) => site.attention(),
        ("AveragePool" | "LpPool" | "MaxPool", _) => site.pool(version),
        ("BatchNormalization", 9) => {
            site.require(site.node().int("spatial") != Some(0), "`spatial` is 0")?;
            site.drop_attribute("spatial");
            Ok(())
        }
        ("BatchNormalization", _) => {
            let training = (1..5).any(|index| site.node().output(index).is_some());
            site.require(!training, "it hands out the statistics of training")
        }
        ("Clip", _) => site.clip(),
        ("ConvTranspose", _) => {
            let same = site.node().string("auto_pad").is_some_and(|mode| mode.starts_with("SAME"));
            site.require(!same, "`auto_pad` was not defined precisely before")
        }
        ("DFT", _) => site.dft(),
        ("Dropout", 10) => site.require(!site.uses_mask(), "the type of its mask changed"),
        ("Dropout", _) => {
            site.require(!site.uses_mask(), "its mask says the opposite in inference")?;
            // The ratio says nothing in inference, which is all there is without the input `training_mode`.
            site.drop_attribute("ratio");
            Ok(())
        }
        ("GridSample", _) => {
            let mode = match site.node().string("mode") {
                None | Some("bilinear") => "linear",
                Some("bicubic") => "cubic",
                _ => return Ok(()),
            };
            site.graph.node_mut(site.id).set_attribute("mode", mode);
            Ok(())
        }
        ("GroupNormalization", _) => site.group_normalization(),
        ("Softmax" | "LogSoftmax" | "Hardmax", _) => site.softmax(),
        ("Pad", _) => site.pad(),
        ("Resize", 11) => site.resize(),
        ("Resize", _) => {
            let dropped = site.node().string("coordinate_transformation_mode") == Some("tf_half_pixel_for_nn");
            site.require(!dropped, "`tf_half_pixel_for_nn` is gone")
        }
        ("RoiAlign", _) => {
            let mode = "output_half_pixel";
            site.graph.node_mut(site.id).set_attribute("coordinate_transformation_mode", mode);
            Ok(())
        }
        ("Scatter", _) => {
            site.graph.node_mut(site.id).op_type = "ScatterElements".to_owned();
            Ok(())
        }
        ("Slice", _) => {
            site.require(site.node().ints("starts").is_some(), "it lacks `starts`")?;
            site.require(site.node().ints("ends").is_some(), "it lacks `ends`")?;
            site.move_ints("starts", 1);
            site.move_ints("ends", 2);
            site.move_ints("axes", 3);
            Ok(())
        }
        ("Split", 13) => {
            site.move_ints("split", 1);
            Ok(())
        }
        ("Split", _) => {
            if site.node().input(1).is_none() {
                let count = site.node().outputs().len() as i64;
                site.graph.node_mut(site.id).set_attribute("num_outputs", count);
            }
            Ok(())
        }
        ("Unsqueeze", _) => {
            site.require(site.node().ints("axes").is_some(), "it lacks `axes`")?;
            site.move_ints("axes", 1);
            Ok(())
        }
        ("TopK", _) => {
            let count = site.node().int("k").ok_or("it lacks `k`")?;
            site.drop_attribute("k");
            site.add_constant(1, "k", Tensor::int64s(&[count]));
            Ok(())
        }
        ("Upsample", 9) => {
            let scales = match site.node().attribute("scales") {
                Some(lathe_ir::AttributeValue::Floats(all)) => all.clone(),
                _ => return Err("it lacks `scales`".into()),
            };
            site.drop_attribute("scales");
            site.add_constant(1, "scales", Tensor::from_f32s(&[scales.len()], &scales));
            Ok(())
        }
        ("Upsample", _) => {
            site.graph.node_mut(site.id).op_type = "Resize".to_owned();
            Ok(())
        }
        (op, _) if op == "Squeeze" || op.starts_with("Reduce") => {
            site.require(site.node().ints("axes") != Some(&[]), "its list of axes is empty")?;
            site.move_ints("axes", 1);
            Ok(())
        }
        _ => Err("there is no conversion".into()),
    }
}

impl Site<'_> {
    fn node(&self) -> &Node {
        self.graph.node(self.id)
    }

    fn require(&self, holds: bool, reason: &str) -> Step {
        if holds { Ok(()) } else { Err(reason.into()) }
    }

    fn drop_attribute(&mut self, name: &str) {
        self.graph.node_mut(self.id).remove_attribute(name);
    }

    /// A name for a constant of the node: that of its first output and what it is.
    fn constant(&mut self, what: &str, tensor: Tensor) -> ValueId {
        let output = self.node().outputs().iter().flatten().next().copied();
        let base = output.map(|v| self.graph.value(v).name.clone()).unwrap_or_default();
        let scope = self.node().scope();
        self.graph.add_initializer(scope, &format!("{base}_{what}"), tensor)
    }

    fn add_constant(&mut self, index: usize, what: &str, tensor: Tensor) {
        let value = self.constant(what, tensor);
        self.graph.set_input(self.id, index, Some(value));
    }

    /// Turns a list attribute, if it is there, into an input.
    fn move_ints(&mut self, name: &str, index: usize) {
        let Some(all) = self.node().ints(name).map(<[i64]>::to_vec) else { return };
        self.drop_attribute(name);
        self.add_constant(index, name, Tensor::int64s(&all));
    }

    fn uses_mask(&self) -> bool {
        self.node().output(1).is_some_and(|v| !self.graph.value(v).uses().is_empty())
    }

    fn elem(&self) -> Result<DataType, Refusal> {
        let elem = self.node().input(0).and_then(|v| self.facts.elem(v));
        Ok(elem.ok_or("the element type of its input is unknown")?)
    }

    fn attention(&self) -> Step {
        let plain = self.node().float("softcap").unwrap_or(0.0) == 0.0 && self.node().output(3).is_none();
        self.require(plain, "the place of `softcap` and of the fourth output changed")
    }

    /// Windows that would begin behind the data have come to be ignored, and their padding is counted differently.
    fn pool(&self, version: i64) -> Step {
        let node = self.node();
        let automatic = node.string("auto_pad").is_some_and(|mode| mode != "NOTSET");
        if node.int("ceil_mode").unwrap_or(0) == 0 || automatic {
            return Ok(());
        }
        let counted = version == 19 && node.int("count_include_pad").unwrap_or(0) != 0;
        self.require(!counted, "`ceil_mode` counts padding differently")?;
        let kernel = node.ints("kernel_shape").ok_or("it lacks `kernel_shape`")?;
        let at = |name: &str, index: usize, default: i64| {
            node.ints(name).map_or(Some(default), |all| all.get(index).copied())
        };
        let inside = kernel.iter().enumerate().all(|(axis, &size)| {
            let pad = at("pads", kernel.len() + axis, 0);
            let (stride, dilation) = (at("strides", axis, 1), at("dilations", axis, 1));
            let reach = dilation.and_then(|d| size.checked_sub(1)?.checked_mul(d)?.checked_add(1));
            let last = pad.zip(stride).and_then(|(pad, stride)| pad.checked_add(stride));
            last.zip(reach).is_some_and(|(last, reach)| last <= reach)
        });
        self.require(inside, "`ceil_mode` may add windows that begin in the padding, which are ignored now")
    }

    fn clip(&mut self) -> Step {
        for (index, name) in [(1, "min"), (2, "max")] {
            let Some(limit) = self.node().float(name) else { continue };
            let tensor = Tensor::from_f64s(self.elem()?, &[], &[limit.into()]).ok_or("its type is no number")?;
            self.drop_attribute(name);
            self.add_constant(index, name, tensor);
        }
        Ok(())
    }

    fn dft(&mut self) -> Step {
        let axis = self.node().int("axis").unwrap_or(1);
        self.drop_attribute("axis");
        self.add_constant(2, "axis", Tensor::from_i64s(&[], &[axis]));
        Ok(())
    }

    fn pad(&mut self) -> Step {
        let pads = self.node().ints("pads").ok_or("it lacks `pads`")?.to_vec();
        let fill = self.node().float("value").unwrap_or(0.0);
        if fill.to_bits() != 0 {
            let tensor = Tensor::from_f64s(self.elem()?, &[], &[fill.into()]).ok_or("its type is no number")?;
            self.add_constant(2, "value", tensor);
        }
        self.drop_attribute("pads");
        self.drop_attribute("value");
        self.add_constant(1, "pads", Tensor::int64s(&pads));
        Ok(())
    }

    /// Until 10, pixels were mapped by the scale alone, and the nearest one was found by cutting off (when shrinking,
    /// runtimes disagreed).
    fn resize(&mut self) -> Step {
        let scales = self.node().input(1).ok_or("it lacks `scales`")?;
        let nearest = self.node().string("mode").unwrap_or("nearest") == "nearest";
        if nearest {
            let grows = self.graph.constant(scales).and_then(Tensor::to_f64s);
            let grows = grows.is_some_and(|all| all.iter().all(|&s| s >= 1.0));
            self.require(grows, "nearest pixels are only defined where constant scales enlarge")?;
        }
        let node = self.graph.node_mut(self.id);
        node.set_attribute("coordinate_transformation_mode", "asymmetric");
        if nearest {
            node.set_attribute("nearest_mode", "floor");
        }
        let data = self.node().input(0);
        // An empty region of interest: it is read in one mode only, but the input was obligatory at first.
        let roi = self.constant("roi", Tensor::from_f32s(&[0], &[]));
        self.graph.set_inputs(self.id, vec![data, Some(roi), Some(scales)]);
        Ok(())
    }

    /// Until 12 all axes from `axis` on were one; from 13 on `axis` is the only one.
    fn softmax(&mut self) -> Step {
        let axis = self.node().int("axis").unwrap_or(1);
        let data = self.node().input(0).ok_or("it lacks an input")?;
        let ndim = self.facts.ndim(data).map(|n| n as i64);
        if axis == -1 || ndim.is_some_and(|n| axis == n - 1) {
            self.graph.node_mut(self.id).set_attribute("axis", -1);
            return Ok(());
        }
        // A target says 0 for the size of the same axis of the rows, which is right for the first axis alone.
        let copies = |sizes: &[DimExpr]| sizes.iter().skip(1).any(|size| !size.is_positive());
        let copies = self.facts.shape(data).is_none_or(copies);
        self.require(!copies || self.to >= 14, "one of its axes may be empty, which needs version 14")?;
        let Some(output) = self.node().output(0) else { return Ok(()) };
        let scope = self.node().scope();
        let name = self.graph.value(output).name.clone();
        let shape = self.graph.append(scope, Node::new("Shape"), &[data], &format!("{name}_shape"));
        let rows = self.graph.append(scope, Node::new("Flatten").with("axis", axis), &[data], &format!("{name}_rows"));
        self.graph.set_input(self.id, 0, Some(rows));
        self.graph.node_mut(self.id).set_attribute("axis", -1);
        let reshape = if copies { Node::new("Reshape").with("allowzero", 1) } else { Node::new("Reshape") };
        let back = self.graph.append(scope, reshape, &[output], &name);
        self.graph.replace_uses(output, back);
        let node = self.graph.producer(back).expect("the node was just appended");
        // Everything else reads the reshaped output; only the Reshape reads the rows.
        self.graph.set_inputs(node, vec![Some(output), Some(shape)]);
        self.facts.inherit(back, output);
        // The stated type is that of the result; it no longer fits what the node itself produces.
        let stated = self.graph.value_mut(output).ty.take();
        let value = self.graph.value_mut(back);
        value.ty = value.ty.take().or(stated);
        Ok(())
    }

    /// Scale and bias were one per group and are one per channel.
    fn group_normalization(&mut self) -> Step {
        let data = self.node().input(0).ok_or("it lacks an input")?;
        let channels = self.facts.shape(data).and_then(|s| s.get(1)?.as_known()).ok_or("its channels are unknown")?;
        let groups = self.node().int("num_groups").ok_or("it lacks `num_groups`")?;
        let each = channels.checked_rem(groups).filter(|&rest| rest == 0 && groups > 0).map(|_| channels / groups);
        let each = each.ok_or("its channels do not fall into `num_groups` groups")?;
        let scope = self.node().scope();
        for (index, what) in [(1, "scale"), (2, "bias")] {
            let value = self.node().input(index).ok_or("it lacks scale or bias")?;
            let column = self.constant(&format!("{what}_column"), Tensor::int64s(&[-1, 1]));
            let wide = self.constant(&format!("{what}_wide"), Tensor::int64s(&[groups, each]));
            let flat = self.constant(&format!("{what}_flat"), Tensor::int64s(&[-1]));
            let at = self.graph.append(scope, Node::new("Reshape"), &[value, column], what);
            let at = self.graph.append(scope, Node::new("Expand"), &[at, wide], what);
            let at = self.graph.append(scope, Node::new("Reshape"), &[at, flat], what);
            self.graph.set_input(self.id, index, Some(at));
        }
        Ok(())
    }
}
