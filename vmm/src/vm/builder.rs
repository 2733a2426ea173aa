//! Makes a microVM out of files.

use std::fs::File;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::rc::Rc;
use std::sync::mpsc::{self, Receiver, Sender};
use std::sync::{Arc, Mutex};

use kvm_ioctls::{Kvm, VcpuFd};
use vm_memory::{GuestAddress, GuestMemoryRegion, MmapRegion};
use vmm_sys_util::eventfd::EventFd;

use super::error::host;
use super::event_loop::{Mailbox, Request};
use super::vcpu::{Machine, Vcpu};
use super::{Monitor, MonitorError, Notice, Restored, Stopper, event_fd};
use crate::arch::x86_64::cpuid::Processor;
use crate::arch::x86_64::saved::Timekeeping;
use crate::arch::x86_64::{boot, cmdline, layout, registers};
use crate::console::{Console, Line};
use crate::control::{Control, Message, TemplateFiles};
use crate::image;
use crate::kernel::KernelImage;
use crate::kvm::{self, KvmError, Vm, save};
use crate::memory::working_set::{self, Recorder, Twins};
use crate::memory::{self, GuestRam, PAGE_BYTES, file};
use crate::spec::{SpecError, VmSpec};
use crate::state::machine::WorkingSet;
use crate::state::{self, MachineState, StateError};
use crate::virtio::VirtioDevice;
use crate::virtio::mmio::{MmioTransport, NOTIFY_OFFSET, Shared, Window};
use crate::virtio::pmem::Pmem;
use crate::virtio::vsock::{ChannelSlot, Vsock};

/// Collects what a microVM is made of.
#[derive(Default)]
pub struct MonitorBuilder {
    spec: Option<VmSpec>,
    channel: Option<UnixStream>,
    files: Option<TemplateFiles>,
    parts: Option<Parts>,
    filters: bool,
    control: Option<Rc<Control>>,
    stop_on: Vec<OwnedFd>,
    on_event: Option<Box<dyn FnMut(Message)>>,
}

impl MonitorBuilder {
    /// What is asked for. Without it, [`build`](Self::build) finds no kernel.
    pub fn spec(mut self, spec: VmSpec) -> Self {
        self.spec = Some(spec);
        self
    }

    /// The host's byte stream, to be joined to the guest's one vsock connection. Without it every connection is refused.
    /// When its other end is closed, the guest is stopped.
    pub fn channel(mut self, channel: impl Into<Option<UnixStream>>) -> Self {
        self.channel = channel.into();
        self
    }

    /// The files of a saved guest, for a specification that asks to restore one.
    pub fn files(mut self, files: impl Into<Option<TemplateFiles>>) -> Self {
        self.files = files.into();
        self
    }

    /// What the microVM is made of, where that was opened beforehand; otherwise [`build`](Self::build) opens it.
    pub fn parts(mut self, parts: Parts) -> Self {
        self.parts = Some(parts);
        self
    }

    /// Filters the system calls of every vCPU's thread and, for good, of the thread that calls [`Monitor::run`]: for a program
    /// that has nothing else to do, and has called [`seccomp::prepare_process`](crate::seccomp::prepare_process).
    pub fn filters(mut self, filters: bool) -> Self {
        self.filters = filters;
        self
    }

    /// Where the host sends requests. When it closes its end, the guest is stopped.
    pub fn control(mut self, control: Rc<Control>) -> Self {
        self.control = Some(control);
        self
    }

    /// Stops the guest when there is anything to read from this descriptor, or its other end is closed. May be used several
    /// times.
    pub fn stop_on(mut self, fd: OwnedFd) -> Self {
        self.stop_on.push(fd);
        self
    }

    /// Calls `f` with what happens to the guest, up to its end, which [`Monitor::run`] returns.
    pub fn on_event(mut self, f: impl FnMut(Message) + 'static) -> Self {
        self.on_event = Some(Box::new(f));
        self
    }

    /// Makes the microVM: everything up to its first instruction.
    ///
    /// # Errors
    /// The first thing that is missing, with its remedy.
    pub fn build(self) -> Result<Monitor, MonitorError> {
        let spec = self.spec.unwrap_or_else(|| VmSpec::new("", ""));
        let mut parts = match self.parts {
            Some(parts) => parts,
            None => Parts::open(&spec, self.files)?,
        };
        parts.watch_pages()?;
        let Parts { origin, image, mut recorder, kvm, .. } = parts;
        let (image, source) = match origin {
            Origin::Kernel(file) => {
                let source = Source::kernel(&spec, file)?;
                (map_image(&spec, image)?, source)
            }
            Origin::Template(files) => {
                let image = map_image(&spec, image)?;
                let source = Source::template(&spec, files, image.size() as u64)?;
                (image, source)
            }
        };

        let kvm = kvm?;
        let ram_bytes = spec.memory_bytes();
        let ram = Arc::new(memory::create(ram_bytes)?);
        let mut vm = Vm::new(&kvm)?;
        source.fill(&spec, &ram, &vm, recorder.as_mut())?;
        if let Some(recorder) = &mut recorder {
            recorder.split_image(&image)?;
        }
        vm.add_interrupt_controllers()?;
        vm.add_ram(&ram)?;
        let image_address = layout::image_address(ram_bytes);
        vm.add_read_only(image_address, &image)?;

        let slot = ChannelSlot::default();
        let mut devices = Devices::new(&vm, &ram)?;
        devices.add(Box::new(Vsock::new(Arc::clone(&slot), spec.template)))?;
        devices.add(Box::new(Pmem::new(image_address, image.size() as u64)))?;
        #[cfg(feature = "seccomp-tests")]
        {
            let (requests, event) = (devices.sender.clone(), Arc::clone(&devices.mailbox));
            let trial =
                super::seccomp_test_port::Trial(Mailbox { device: usize::MAX, requests, event });
            devices.machine.ports.insert(
                super::seccomp_test_port::PORT,
                1,
                Arc::new(Mutex::new(trial)),
            );
        }
        let Devices { mut machine, windows, shared, transports, requests, mailbox, .. } = devices;
        if spec.console {
            let line = event_fd().map_err(host("create an eventfd"))?;
            vm.interrupt(&line, layout::SERIAL_IRQ)?;
            let console = Arc::new(Mutex::new(Console::new(Line(line))));
            machine.ports.insert(layout::SERIAL_PORT, layout::SERIAL_PORTS, console);
        }

        let machine = Arc::new(machine);
        let notice = Notice::new(!spec.restore).map_err(host("create an eventfd"))?;
        let vcpu = |index, fd, time| Vcpu {
            index,
            fd,
            time,
            machine: Arc::clone(&machine),
            notice: Arc::clone(&notice),
        };
        let (vcpus, restored) = match source {
            Source::Kernel { kernel, .. } => {
                let line = cmdline::command_line(&windows, spec.console)
                    .map_err(MonitorError::CommandLine)?;
                registers::write_tables(&ram).map_err(MonitorError::Tables)?;
                boot::write_boot_data(&ram, ram_bytes, spec.vcpus, &line)?;
                let vcpus = (0..spec.vcpus)
                    .map(|index| {
                        Ok(vcpu(index, vm.add_vcpu(index, spec.vcpus, kernel.entry())?, None))
                    })
                    .collect::<Result<Vec<_>, KvmError>>()?;
                (vcpus, None)
            }
            Source::Template { memory, state, .. } => {
                // The counter of the first one, which was read when all of them stood still.
                let tsc = state.vcpus.first().map_or(0, |vcpu| vcpu.time.tsc);
                let vcpus = (0..spec.vcpus)
                    .zip(&state.vcpus)
                    .map(|(index, saved)| {
                        let time = Timekeeping { tsc, ..saved.time };
                        Ok(vcpu(index, vm.restore_vcpu(index, spec.vcpus, saved)?, Some(time)))
                    })
                    .collect::<Result<Vec<_>, KvmError>>()?;
                vm.restore_chips(&state.chips)?;
                if let (None, Some(vcpu)) = (&recorder, vcpus.first()) {
                    prefault(&vcpu.fd, &ram, image_address, &state.working_set);
                }
                (
                    vcpus,
                    Some(Restored {
                        state: *state,
                        recording: recorder.map(|recorder| (recorder, memory)),
                    }),
                )
            }
        };

        let mut monitor = Monitor {
            vcpus,
            notice,
            stopper: Stopper(Arc::new(event_fd().map_err(host("create an eventfd"))?)),
            stop_on: self.stop_on,
            control: self.control,
            on_event: self.on_event.unwrap_or_else(|| Box::new(|_| {})),
            requests,
            mailbox,
            shared,
            transports,
            slot,
            restored,
            filters: self.filters,
            kvm: spec.template.then_some(kvm),
            vm,
            memory: Memory { ram, image },
            spec,
        };
        if let Some(channel) = self.channel {
            monitor.attach(channel)?;
        }
        Ok(monitor)
    }
}

/// What a microVM is made of, open: whoever has it needs no path any more.
pub struct Parts {
    origin: Origin,
    image: File,
    /// To record with: the same files opened once more.
    twins: Option<Twins>,
    recorder: Option<Recorder>,
    /// An error waits until the files have been looked at: what is wrong with them is told first.
    kvm: Result<Kvm, KvmError>,
}

/// Where a guest comes from, as files.
enum Origin {
    Kernel(File),
    Template(TemplateFiles),
}

impl Parts {
    /// Opens what the specification names, and `/dev/kvm`.
    ///
    /// # Errors
    /// The specification is out of range, or the first file that cannot be opened.
    pub fn open(spec: &VmSpec, files: Option<TemplateFiles>) -> Result<Self, MonitorError> {
        spec.validate()?;
        let origin = match files {
            None if !spec.restore => Origin::Kernel(open("kernel", &spec.kernel)?),
            Some(files) if spec.restore => Origin::Template(files),
            _ => {
                return Err(SpecError::Together(
                    "the files of a template and `restore` need each other",
                )
                .into());
            }
        };
        let image = open("root image", &spec.root_image)?;
        let twins = match &origin {
            Origin::Template(files) if spec.record => Some(Twins::open(&files.memory, &image)?),
            _ => None,
        };
        Ok(Self { origin, image, twins, recorder: None, kvm: kvm::open() })
    }

    /// Gets ready to find out which pages are used, if that is asked for. To be called in the process that runs the guest,
    /// before it is made undumpable and while it has a `/proc`; once is enough.
    ///
    /// # Errors
    /// There is no `/proc`.
    pub fn watch_pages(&mut self) -> Result<(), MonitorError> {
        if let Some(twins) = self.twins.take() {
            self.recorder = Some(Recorder::new(twins)?);
        }
        Ok(())
    }
}

/// Where a guest comes from.
enum Source {
    /// It boots.
    Kernel { file: File, kernel: KernelImage },
    /// It goes on.
    Template { memory: File, processor: Processor, state: Box<MachineState> },
}

impl Source {
    fn kernel(spec: &VmSpec, file: File) -> Result<Self, MonitorError> {
        let low_end = GuestAddress(spec.memory_bytes().min(layout::DEVICE_HOLE.0));
        let kernel = KernelImage::read(&file, layout::HIGH_START, low_end)
            .map_err(|source| MonitorError::Kernel { path: spec.kernel.clone(), source })?;
        Ok(Self::Kernel { file, kernel })
    }

    /// Verifies a template and compares it with what is asked for. The key is gone when this returns.
    fn template(
        spec: &VmSpec,
        files: TemplateFiles,
        image_bytes: u64,
    ) -> Result<Self, MonitorError> {
        let TemplateFiles { memory, state, key } = files;
        let bytes = state::read(&state)?;
        let (header, payload) = state::open(&bytes, &key)?;
        for (what, made, asked) in [
            ("MiB of memory", header.memory_mib, spec.memory_mib),
            ("vCPUs", header.vcpus.into(), spec.vcpus.into()),
        ] {
            if made != asked {
                return Err(StateError::Size { what, made, asked }.into());
            }
        }
        let state = MachineState::decode(payload, spec.vcpus, spec.memory_bytes(), image_bytes)
            .map_err(StateError::from)?;
        if state.binding != spec.binding {
            let (made, asked) = (state.binding, spec.binding.clone());
            return Err(StateError::Binding { made, asked }.into());
        }
        file::check(&memory, spec.memory_bytes())?;
        Ok(Self::Template { memory, processor: header.processor, state: Box::new(state) })
    }

    /// Puts into memory what comes from files, on a processor that it fits.
    fn fill(
        &self,
        spec: &VmSpec,
        ram: &GuestRam,
        vm: &Vm,
        recorder: Option<&mut Recorder>,
    ) -> Result<(), MonitorError> {
        match self {
            Self::Kernel { file, kernel } => kernel
                .map(file, ram)
                .map_err(|source| MonitorError::Kernel { path: spec.kernel.clone(), source }),
            Self::Template { memory, processor, state } => {
                let (made, here) = (*processor, vm.processor(spec.vcpus));
                if made != here {
                    return Err(StateError::Processor { made, here }.into());
                }
                match recorder {
                    Some(recorder) if recorder.can_split(&state.parts) => {
                        recorder.map(ram, memory, &state.parts)?;
                    }
                    Some(_) => file::map(ram, memory, &state.parts)?,
                    None => {
                        file::map(ram, memory, &state.parts)?;
                        working_set::populate(ram, &state.working_set.written);
                    }
                }
                Ok(())
            }
        }
    }
}

/// Maps the pages that a restored guest uses first, all at once.
fn prefault(vcpu: &VcpuFd, ram: &GuestRam, image: GuestAddress, set: &WorkingSet) {
    let mut able = true;
    for runs in [&set.written, &set.read] {
        working_set::for_each(ram, runs, |region, start, bytes| {
            able =
                able && save::prefault(vcpu, GuestAddress(region.start_addr().0 + start.0), bytes);
        });
    }
    for run in &set.image {
        let at = GuestAddress(image.0 + u64::from(run.first) * PAGE_BYTES);
        able = able && save::prefault(vcpu, at, u64::from(run.count) * PAGE_BYTES);
    }
}

fn map_image(spec: &VmSpec, file: File) -> Result<MmapRegion<()>, MonitorError> {
    image::map(&Arc::new(file))
        .map_err(|source| MonitorError::Image { path: spec.root_image.clone(), source })
}

fn open(what: &'static str, path: &Path) -> Result<File, MonitorError> {
    File::open(path).map_err(|source| MonitorError::Open { what, path: path.to_owned(), source })
}

/// Everything virtio devices are registered with while a microVM is made.
struct Devices<'a> {
    vm: &'a Vm,
    ram: &'a Arc<GuestRam>,
    machine: Machine,
    windows: Vec<Window>,
    shared: Vec<Arc<Shared>>,
    transports: Vec<Transport>,
    sender: Sender<Request>,
    requests: Receiver<Request>,
    mailbox: Arc<EventFd>,
}

impl<'a> Devices<'a> {
    fn new(vm: &'a Vm, ram: &'a Arc<GuestRam>) -> Result<Self, MonitorError> {
        let (sender, requests) = mpsc::channel();
        let mailbox = Arc::new(event_fd().map_err(host("create an eventfd"))?);
        let (windows, shared, transports) = Default::default();
        Ok(Self {
            vm,
            ram,
            machine: Machine::default(),
            windows,
            shared,
            transports,
            sender,
            requests,
            mailbox,
        })
    }

    fn add(&mut self, model: Box<dyn VirtioDevice>) -> Result<(), MonitorError> {
        let device = self.windows.len();
        let address =
            GuestAddress(layout::VIRTIO_MMIO.0 + device as u64 * layout::VIRTIO_MMIO_BYTES);
        let irq = layout::VIRTIO_IRQ + u32::try_from(device).unwrap_or(u32::MAX);

        let line = event_fd().map_err(host("create an eventfd"))?;
        self.vm.interrupt(&line, irq)?;
        let shared = Shared::new(line);
        let kick = Arc::new(event_fd().map_err(host("create an eventfd"))?);
        if let Some(queue) = model.busy_queue() {
            self.vm.notify(&kick, GuestAddress(address.0 + NOTIFY_OFFSET), queue.into())?;
        }
        let worker =
            Mailbox { device, requests: self.sender.clone(), event: Arc::clone(&self.mailbox) };
        let transport =
            MmioTransport::new(model, worker, Arc::clone(self.ram), Arc::clone(&shared), kick);
        let transport = Arc::new(Mutex::new(transport));
        self.machine.mmio.insert(address.0, layout::VIRTIO_MMIO_BYTES, Arc::clone(&transport) as _);
        self.windows.push(Window { address, irq });
        self.shared.push(shared);
        self.transports.push(transport);
        Ok(())
    }
}

/// A device's registers, to be saved and restored while no vCPU runs.
pub(super) type Transport = Arc<Mutex<MmioTransport<Mailbox>>>;

/// Mappings that KVM has been given. Dropped after everything that can run the guest.
pub(super) struct Memory {
    pub(super) ram: Arc<GuestRam>,
    pub(super) image: MmapRegion<()>,
}
