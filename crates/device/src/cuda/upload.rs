//! Images on their way to a GPU, while it works on others.

use super::call;
use super::kernels::IMAGES;
use super::launch::{Grid, int, launch, long, pointer};
use super::memory::{Output, Real, address};
use candle_core::{CudaDevice, DType, Device, Tensor};
use cudarc::driver::{CudaEvent, CudaSlice, CudaStream, DevicePtr, PinnedHostSlice, result};
use std::sync::Arc;

const OP: &str = "images";
/// Batches on their way at once: one that the network works on, one that follows.
const SLOTS: usize = 2;

/// Takes batches of bytes over pinned memory and a stream of its own to the GPU and normalises them
/// there: the copy of a batch runs beside the work on the one before.
#[derive(Debug)]
pub struct Uploads {
    device: CudaDevice,
    copies: Arc<CudaStream>,
    slots: [Option<Slot>; SLOTS],
    next: usize,
    /// `(3, 256)`, in the memory of the GPU.
    levels: Tensor,
}

/// Memory of a batch on both sides.
#[derive(Debug)]
struct Slot {
    host: PinnedHostSlice<u8>,
    bytes: CudaSlice<u8>,
    /// The copy is over, and so the host's side free.
    copied: CudaEvent,
    /// The kernel that reads is over, and so the other side free.
    used: CudaEvent,
}

impl Uploads {
    /// With the normalised value of each value of each channel.
    ///
    /// # Errors
    /// [`crate::Error::Call`].
    pub fn new(device: &CudaDevice, levels: &[[f32; 256]; 3]) -> candle_core::Result<Self> {
        let context = Arc::clone(device.cuda_stream().context());
        let copies = call(OP, context.new_stream())?;
        let on_gpu = Device::Cuda(device.clone());
        Ok(Self {
            device: device.clone(),
            copies,
            slots: Default::default(),
            next: 0,
            levels: Tensor::from_slice(levels.as_flattened(), (3, 256), &on_gpu)?,
        })
    }

    /// `(images, 3, height, width)` of f32 or f64 from `(height, width, 3)` bytes each, of which a part
    /// holds one or several. Returns before the copy is over.
    ///
    /// # Errors
    /// [`crate::Error::OutOfMemory`], [`crate::Error::Call`].
    pub fn images<'a>(
        &mut self,
        parts: impl Iterator<Item = &'a [u8]>,
        (images, height, width): (usize, usize, usize),
        dtype: DType,
    ) -> candle_core::Result<Tensor> {
        let shape = (images, 3, height, width);
        match dtype {
            DType::F64 => Ok(self
                .send::<f64>(parts, (images, height * width))?
                .into_tensor(shape)),
            _ => Ok(self
                .send::<f32>(parts, (images, height * width))?
                .into_tensor(shape)),
        }
    }

    fn send<'a, T: Real>(
        &mut self,
        parts: impl Iterator<Item = &'a [u8]>,
        (images, plane): (usize, usize),
    ) -> candle_core::Result<Output<T>> {
        let pixels = images * plane;
        let out = Output::<T>::new(OP, &self.device, &[images, 3, plane])?;
        if pixels == 0 {
            return Ok(out);
        }
        let work = self.device.cuda_stream();
        self.make_room(3 * pixels)?;
        let Some(slot) = &mut self.slots[self.next] else {
            candle_core::bail!("{OP}: no room for a batch");
        };
        // The copy before last.
        call(OP, slot.copied.synchronize())?;
        let host = call(OP, slot.host.as_mut_slice())?;
        let mut rest = &mut host[..3 * pixels];
        for part in parts {
            let Some((to, more)) = rest.split_at_mut_checked(part.len()) else {
                candle_core::bail!("{OP}: more bytes than {images} images of {plane} pixels have");
            };
            to.copy_from_slice(part);
            rest = more;
        }
        if !rest.is_empty() {
            candle_core::bail!("{OP}: {} bytes are missing", rest.len());
        }
        let (at, _) = slot.bytes.device_ptr(&work);
        let copies = slot.bytes.stream();
        call(OP, copies.wait(&slot.used))?;
        // SAFETY: both sides are as long, and live until the events say that they are free.
        let copied =
            unsafe { result::memcpy_htod_async(at, &host[..3 * pixels], copies.cu_stream()) };
        call(OP, copied)?;
        call(OP, slot.copied.record(copies))?;
        call(OP, work.wait(&slot.copied))?;
        let arguments = [
            pointer(at),
            pointer(address::<f32>(&self.levels)?),
            pointer(out.at()),
            long(pixels),
            int(plane),
        ];
        // SAFETY: the arguments of the kernel, in memory that was made for them.
        unsafe {
            launch::<T>(
                &self.device,
                &IMAGES,
                "normalise_bytes",
                Grid::over(pixels),
                &arguments,
            )?;
        }
        call(OP, slot.used.record(&work))?;
        self.next = (self.next + 1) % SLOTS;
        Ok(out)
    }

    /// Makes the slot whose turn it is large enough for so many bytes.
    fn make_room(&mut self, len: usize) -> crate::Result<()> {
        let slot = match self.slots[self.next].take() {
            Some(slot) if slot.bytes.len() >= len => slot,
            small => {
                // What was there is used no more.
                call(OP, self.device.cuda_stream().synchronize())?;
                call(OP, self.copies.synchronize())?;
                drop(small);
                let context = self.copies.context();
                // SAFETY: written before they are read.
                let (host, bytes) = unsafe {
                    (
                        call(OP, context.alloc_pinned::<u8>(len))?,
                        call(OP, self.copies.alloc::<u8>(len))?,
                    )
                };
                let event = || call(OP, context.new_event(None));
                Slot {
                    host,
                    bytes,
                    copied: event()?,
                    used: event()?,
                }
            }
        };
        self.slots[self.next] = Some(slot);
        Ok(())
    }
}

impl Drop for Uploads {
    fn drop(&mut self) {
        // Memory of a copy under way must outlive it; an error was told where it came up.
        let _ = self.copies.synchronize();
        let _ = self.device.cuda_stream().synchronize();
    }
}
