# A bzImage around the flat image: the setup header (boot protocol 2.12, 32-bit entry at 0x100000), no real-mode code.
        .macro field offset kind value
        .org    \offset
        \kind   \value
        .endm
        field   0x1f1 .byte 1                   # setup_sects beside the first
        field   0x1f4 .long (payload_end - payload) / 16
        field   0x1fe .word 0xaa55
        field   0x200 .word 0x66eb              # a jump to where the header ends, which tells its size
        field   0x202 .long 0x53726448        # HdrS
        field   0x206 .word 0x20c
        field   0x211 .byte 1                   # LOADED_HIGH
        field   0x214 .long 0x100000            # code32_start
        field   0x238 .long 2047                # cmdline_size
        field   0x258 .quad 0x100000            # pref_address
        field   0x260 .long 0xf1000             # init_size: up to the end of the report page
        .org    0x400
payload:
        .incbin "guest.bin"
payload_end:
