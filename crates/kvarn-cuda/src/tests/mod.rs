//! Tests that need a driver: each in a process of its own, with a double of the driver's library, or on a device.

mod captures;
mod cases;
mod double;
mod images;
mod on_device;
mod steps;

use crate::image::{Image, Images};
use crate::{Architecture, Version};

/// A kernel for tests, `kvarn_test_fill(address, value, count)`: writes `count` words. And one that traps.
const PTX: &str = concat!(
    ".version 7.0\n.target sm_80\n.address_size 64\n",
    ".visible .entry kvarn_test_fill(.param .u64 to, .param .u32 value, .param .u32 count) {\n",
    ".reg .pred %p; .reg .b32 %r<6>; .reg .b64 %a<3>;\n",
    "ld.param.u64 %a0, [to]; ld.param.u32 %r0, [value]; ld.param.u32 %r1, [count];\n",
    "mov.u32 %r2, %ctaid.x; mov.u32 %r3, %ntid.x; mov.u32 %r4, %tid.x;\n",
    "mad.lo.u32 %r5, %r2, %r3, %r4; setp.ge.u32 %p, %r5, %r1; @%p ret;\n",
    "mul.wide.u32 %a1, %r5, 4; add.u64 %a2, %a0, %a1; st.global.u32 [%a2], %r0; ret; }\n",
    ".visible .entry kvarn_test_wild(.param .u64 to) {\n",
    ".reg .b64 %a; .reg .b32 %r; ld.param.u64 %a, [to]; mov.u32 %r, 1; st.global.u32 [%a], %r; ret; }\n\0"
);

static IMAGES: Images = Images {
    toolkit: Version::new(13, 0),
    architectures: &[Architecture { number: 80, ptx: true }],
    list: &[Image { name: "test", bytes: PTX.as_bytes() }],
};
