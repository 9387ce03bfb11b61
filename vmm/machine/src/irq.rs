//! The interrupt controllers and the timer that live in the kernel, saved and loaded. Not the LAPICs, which are vCPUs'.

use kvm_bindings::{
    KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE, KVM_PIT_SPEAKER_DUMMY, kvm_irqchip, kvm_pit_config,
    kvm_pit_state2,
};
use kvm_ioctls::VmFd;
use serde::{Deserialize, Serialize};

/// The chips' record, version 1: both PICs and the IOAPIC.
#[derive(Serialize, Deserialize)]
pub(crate) struct IrqchipRecord {
    master: kvm_irqchip,
    slave: kvm_irqchip,
    ioapic: kvm_irqchip,
}

/// The timer's record, version 1.
#[derive(Serialize, Deserialize)]
pub(crate) struct PitRecord {
    state: kvm_pit_state2,
}

/// Makes the chips and the timer; before any vCPU, so that each gets a LAPIC.
pub(crate) fn create(vm: &VmFd) -> Result<(), kvm_ioctls::Error> {
    vm.create_irq_chip()?;
    vm.create_pit2(kvm_pit_config { flags: KVM_PIT_SPEAKER_DUMMY, ..Default::default() })
}

fn get(vm: &VmFd, chip_id: u32) -> Result<kvm_irqchip, kvm_ioctls::Error> {
    let mut chip = kvm_irqchip { chip_id, ..Default::default() };
    vm.get_irqchip(&mut chip)?;
    Ok(chip)
}

/// Reads the three chips.
pub(crate) fn save_chips(vm: &VmFd) -> Result<IrqchipRecord, kvm_ioctls::Error> {
    Ok(IrqchipRecord {
        master: get(vm, KVM_IRQCHIP_PIC_MASTER)?,
        slave: get(vm, KVM_IRQCHIP_PIC_SLAVE)?,
        ioapic: get(vm, KVM_IRQCHIP_IOAPIC)?,
    })
}

/// Sets the three chips; the numbers in a record are not believed.
pub(crate) fn load_chips(vm: &VmFd, record: &IrqchipRecord) -> Result<(), kvm_ioctls::Error> {
    let chips =
        [(KVM_IRQCHIP_PIC_MASTER, &record.master), (KVM_IRQCHIP_PIC_SLAVE, &record.slave), (KVM_IRQCHIP_IOAPIC, &record.ioapic)];
    for (chip_id, chip) in chips {
        vm.set_irqchip(&kvm_irqchip { chip_id, ..*chip })?;
    }
    Ok(())
}

/// Reads the timer.
pub(crate) fn save_pit(vm: &VmFd) -> Result<PitRecord, kvm_ioctls::Error> {
    Ok(PitRecord { state: vm.get_pit2()? })
}

/// Sets the timer.
pub(crate) fn load_pit(vm: &VmFd, record: &PitRecord) -> Result<(), kvm_ioctls::Error> {
    vm.set_pit2(&record.state)
}
