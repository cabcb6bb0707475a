//! What the processor can do, and what of it is used.

/// Instruction sets that this backend is compiled for, each with all before it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Level {
    /// What every processor of the target has.
    Portable,
    /// AVX2, FMA, F16C.
    Avx2,
    /// AVX-512 F, VL, BW, DQ.
    Avx512,
    /// AVX-512 with VNNI.
    Avx512Vnni,
}

impl Level {
    pub(crate) const ALL: [Self; 4] = [Self::Portable, Self::Avx2, Self::Avx512, Self::Avx512Vnni];

    const fn name(self) -> &'static str {
        match self {
            Self::Portable => "portable",
            Self::Avx2 => "avx2",
            Self::Avx512 => "avx512",
            Self::Avx512Vnni => "avx512vnni",
        }
    }

    /// The highest that this processor has.
    pub(crate) fn found() -> Self {
        #[cfg(target_arch = "x86_64")]
        {
            let avx2 = is_x86_feature_detected!("avx2")
                && is_x86_feature_detected!("fma")
                && is_x86_feature_detected!("f16c");
            let avx512 = is_x86_feature_detected!("avx512f")
                && is_x86_feature_detected!("avx512vl")
                && is_x86_feature_detected!("avx512bw")
                && is_x86_feature_detected!("avx512dq");
            match (avx2, avx512, is_x86_feature_detected!("avx512vnni")) {
                (true, true, true) => Self::Avx512Vnni,
                (true, true, false) => Self::Avx512,
                (true, false, _) => Self::Avx2,
                _ => Self::Portable,
            }
        }
        #[cfg(not(target_arch = "x86_64"))]
        Self::Portable
    }
}

/// Instruction sets that this backend is compiled for, the smallest first.
pub fn instruction_sets() -> [&'static str; 4] {
    Level::ALL.map(Level::name)
}

/// The instruction set in use: the largest that the processor has, of those up to the one that `KVARN_CPU` names.
pub fn instruction_set() -> &'static str {
    level().name()
}

/// See [`instruction_set`]; decided once per process.
pub(crate) fn level() -> Level {
    static LEVEL: std::sync::OnceLock<Level> = std::sync::OnceLock::new();
    *LEVEL.get_or_init(|| {
        let wanted = std::env::var("KVARN_CPU").unwrap_or_default();
        let most = Level::ALL.into_iter().find(|level| level.name() == wanted);
        most.map_or_else(Level::found, |most| most.min(Level::found()))
    })
}

/// Compiles `$body` for AVX-512, for AVX2 with FMA, and for the target's baseline, and calls the best one.
///
/// `$fma` is a constant that tells the body whether `mul_add` is one instruction.
macro_rules! dispatch {
    ($(#[$doc:meta])* fn $name:ident($($arg:ident: $type:ty),* $(,)?) = $body:ident) => {
        $(#[$doc])*
        pub(crate) fn $name($($arg: $type),*) {
            #[cfg(target_arch = "x86_64")]
            {
                #[target_feature(enable = "avx512f,avx512vl,avx512bw,avx512dq,avx2,fma,f16c")]
                fn avx512($($arg: $type),*) {
                    $body::<true>($($arg),*);
                }
                #[target_feature(enable = "avx2,fma,f16c")]
                fn avx2($($arg: $type),*) {
                    $body::<true>($($arg),*);
                }
                match crate::features::level() {
                    // SAFETY: the features were found on this processor.
                    crate::features::Level::Avx512 | crate::features::Level::Avx512Vnni => return unsafe { avx512($($arg),*) },
                    // SAFETY: as above.
                    crate::features::Level::Avx2 => return unsafe { avx2($($arg),*) },
                    crate::features::Level::Portable => {}
                }
            }
            $body::<false>($($arg),*);
        }
    };
}
pub(crate) use dispatch;

/// `a · b + c`: fused where that is one instruction.
#[inline(always)]
pub(crate) fn fma<const FMA: bool>(a: f32, b: f32, c: f32) -> f32 {
    if FMA { a.mul_add(b, c) } else { a * b + c }
}
