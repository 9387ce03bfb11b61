# Entry points, descriptor tables and the sleep of the guest. 32-bit protected mode, paging off, no FPU.
# The image is flat and linked at 0x100000: a bzImage loader enters at its first byte (ESI = boot_params),
# a PVH loader at 0x100010 (EBX = hvm_start_info).
        .section .note.pvh, "a", @note
        .balign 4
        .long   4, 4, 18                # "Xen", 4 bytes, XEN_ELFNOTE_PHYS32_ENTRY
        .asciz  "Xen"
        .long   pvh_entry

        .section .head, "ax"
        .globl  pvh_entry, clock_sleep
head:   xorl    %ebx, %ebx
        .balign 16, 0x90
pvh_entry:
        cld                             # both loaders enter with flat segments and interrupts off
        lgdt    gdt_pointer
        lidt    idt_pointer
        movl    $stack + 8192, %esp
        pushl   %esi
        pushl   %ebx
        call    guest_main

clock_sleep:                            # HLT for about 1 ms (the LAPIC timer of every hypervisor known runs at 1 GHz)
        movl    $1000000, 0xfee00380
        sti
        hlt
1:      cli
        ret
irq_stub:                               # interrupts are on only in the HLT above, so the way back is known;
        movl    $0, 0xfee000b0          # EOI
        addl    $12, %esp               # and IRET is what KVM's emulator lacks in protected mode
        jmp     1b

gdt:    .quad   0, 0x00cf9b000000ffff   # CS of the interrupt
gdt_pointer:
        .word   gdt_pointer - gdt - 1
        .long   gdt
idt:    .skip   32 * 8                  # no exceptions: one resets the machine
        .word   irq_stub - head, 8, 0x8e00, 0x10        # 0x10: the image is linked at 0x100000
idt_pointer:
        .word   idt_pointer - idt - 1
        .long   idt
        .lcomm  stack, 8192
