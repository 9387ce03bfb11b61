# Entry points, descriptor table and interrupt stubs of the guest. 32-bit protected mode, paging off, no FPU.
# The image is flat and linked at 0x100000: a bzImage loader enters at its first byte (ESI = boot_params),
# a PVH loader at 0x100010 (EBX = hvm_start_info).
        .section .note.pvh, "a", @note
        .long   4, 4, 18                # "Xen", 4 bytes, XEN_ELFNOTE_PHYS32_ENTRY
        .asciz  "Xen"
        .long   pvh_entry

        .section .head, "ax"
        .globl  pvh_entry
        movl    $0, %ebp
        jmp     enter
        .org    0x10
pvh_entry:
        movl    %ebx, %esi
        movl    $1, %ebp
enter:  cli
        cld
        lgdt    gdt_pointer
        ljmp    $8, $1f
1:      movl    $16, %eax
        movl    %eax, %ds
        movl    %eax, %es
        movl    %eax, %ss
        movl    $bss_start, %edi        # a bzImage loader, and a reboot, leave rubbish in bss
        movl    $bss_end, %ecx
        subl    %edi, %ecx
        shrl    $2, %ecx
        xorl    %eax, %eax
        rep stosl
        movl    $stack_end, %esp
        pushl   %esi
        pushl   %ebp
        call    guest_main

        .globl  irq_stub, trap_stub, sleep_until_irq
sleep_until_irq:
        sti
        hlt
sleep_done:
        cli
        ret
irq_stub:                               # interrupts are on only in the HLT above, so the way back is known;
        movl    $0, 0xfee000b0          # EOI
        addl    $12, %esp               # and IRET is what KVM's emulator lacks in protected mode
        jmp     sleep_done
trap_stub:                              # any exception: the top of the stack is an error code or EIP, then EIP or CS
        pushl   $exception
        call    fail

        .balign 8
gdt:    .quad   0, 0x00cf9b000000ffff, 0x00cf93000000ffff
gdt_pointer:
        .word   gdt_pointer - gdt - 1
        .long   gdt
exception:
        .asciz  "exception, top of stack"
        .lcomm  stack, 8192
        .set    stack_end, stack + 8192
