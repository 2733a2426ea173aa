//! Saving the registers of a device, and restoring them.

use std::sync::atomic::Ordering;

use virtio_bindings::virtio_config::{
    VIRTIO_CONFIG_S_FAILED, VIRTIO_CONFIG_S_FEATURES_OK, VIRTIO_CONFIG_S_NEEDS_RESET,
};

use super::super::queue::QueuePosition;
use super::super::{HandlerState, NotQuiescent, QueueHandler};
use super::{ACKNOWLEDGE, DRIVER, DRIVER_OK, FEATURES_OK, MmioTransport, QueueRegisters, Worker};
use crate::state::machine::{DeviceState, QueueState};
use crate::state::malformed::Malformed;

impl<W: Worker> MmioTransport<W> {
    /// Returns the state of the device, of a guest whose vCPUs are stopped. `handler` is the
    /// running half, if there is one.
    ///
    /// # Errors
    /// The device cannot be saved now.
    pub fn save(&self, handler: Option<&dyn QueueHandler>) -> Result<DeviceState, NotQuiescent> {
        let status = self.status();
        if status & (VIRTIO_CONFIG_S_NEEDS_RESET | VIRTIO_CONFIG_S_FAILED) != 0 {
            return Err(NotQuiescent::DeviceFailed);
        }
        let HandlerState { positions, request } = match handler {
            Some(handler) if status == DRIVER_OK => handler.save()?,
            None if status != DRIVER_OK => HandlerState {
                positions: vec![QueuePosition::default(); self.queues.len()],
                request: None,
            },
            _ => return Err(NotQuiescent::DeviceChanging),
        };
        let queues = self.queues.iter().zip(positions).map(|(registers, position)| QueueState {
            size: registers.size,
            ready: registers.ready,
            rings: [registers.descriptors, registers.available, registers.used],
            next_available: position.next_available,
            next_used: position.next_used,
        });
        Ok(DeviceState {
            status,
            interrupts: self.shared.interrupt_status.load(Ordering::SeqCst),
            features: self.driver_features,
            selected: [self.queue_sel, self.device_features_sel, self.driver_features_sel],
            queues: queues.collect(),
            request,
        })
    }

    /// Sets the registers to a saved state, and starts the running half if it ran. A guest has
    /// chosen the values, so they are checked as if a driver had written them.
    ///
    /// # Errors
    /// No driver could have brought the device into this state.
    pub fn restore(&mut self, state: &DeviceState) -> Result<(), Malformed> {
        let DeviceState { status, interrupts, features, selected, queues, request } = state;
        // Until a driver sets `FEATURES_OK`, it may have written any features. They are checked
        // when it does.
        let agreed = *status & VIRTIO_CONFIG_S_FEATURES_OK != 0;
        if ![0, ACKNOWLEDGE, DRIVER, FEATURES_OK, DRIVER_OK].contains(status)
            || agreed && !self.may_agree_on(*features)
            || queues.len() != self.queues.len()
        {
            return Err(Malformed::Device);
        }
        for (registers, saved) in self.queues.iter_mut().zip(queues) {
            let [descriptors, available, used] = saved.rings;
            let QueueState { size, ready, .. } = *saved;
            *registers = QueueRegisters { size, ready, descriptors, available, used };
        }
        [self.queue_sel, self.device_features_sel, self.driver_features_sel] = *selected;
        self.driver_features = *features;
        self.shared.status.store(*status, Ordering::SeqCst);
        self.shared.interrupt_status.store(*interrupts, Ordering::SeqCst);
        if *status == DRIVER_OK {
            let position = |saved: &QueueState| QueuePosition {
                next_available: saved.next_available,
                next_used: saved.next_used,
            };
            let positions: Vec<_> = queues.iter().map(position).collect();
            let queues = self.build_queues(&positions).map_err(|_| Malformed::Queue)?;
            self.activate(queues, *request);
        }
        if *interrupts != 0 {
            // The interrupt may have been on its way to the interrupt controller when that was
            // saved. One interrupt too many is harmless.
            self.shared.raise_irq();
        }
        Ok(())
    }
}

#[cfg(test)]
#[path = "snapshot_test.rs"]
mod tests;
